"""What happens between HTTP and the parts behind it: state, variant, context, inference, answer."""

import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from onesearch.context import SearchContext, profile_text
from onesearch.errors import InputError
from onesearch.search import SearchOptions, SearchResult
from service.admission import NARROW_BEAM, Admission
from service.deployment import Deployment, Variant
from service.events import Exposure
from service.memory import Memory
from service.problems import HeaderError, NotFound
from service.result_cache import Found, Outcome, ResultCache, Twins, result_key
from service.schemas import EventRequest, ProfileRequest, SearchFilters, SearchRequest
from service.settings import Settings
from service.telemetry import Metrics

VARIANT_HEADER = "X-OneSearch-Variant"
DEADLINE_HEADER = "X-OneSearch-Deadline-Ms"
MAX_DEADLINE_MS = 60_000
BUCKET_HEADER = "X-OneSearch-Bucket-Key"
MAX_BUCKET_KEY = 256


@dataclass(frozen=True)
class Caller:
    """What the headers of a request say: its id, a variant to force, the key of the split, its deadline.

    deadline: the `time.monotonic()` after which the answer is of no use; None for the default of the service.
    """

    request_id: str
    forced_variant: str | None = None
    bucket_key: str | None = None
    deadline: float | None = None

    def split_key(self, user: str | None) -> str:
        """What the split goes by."""
        return self.bucket_key or user or self.request_id


@dataclass(frozen=True)
class Answer:
    """A finished search: the JSON body, the variant that answered and the time of each stage."""

    body: bytes
    variant: str
    timings_ms: Mapping[str, float]


class Pipeline:
    """Answers searches and records events."""

    def __init__(
        self,
        deployment: Deployment,
        memory: Memory,
        settings: Settings,
        metrics: Metrics,
        catch_up: Callable[[], Awaitable[None]],
    ) -> None:
        """catch_up: makes visible what other processes changed of the items."""
        self._catch_up = catch_up
        self._deployment = deployment
        self._memory = memory
        self._deadline = settings.deadline_ms / 1e3
        self._admission = Admission(settings.concurrency, settings.queue_limit, metrics.load)
        self._metrics = metrics
        self._results = ResultCache(settings.result_cache) if settings.result_cache else None
        self._twins = Twins()

    def choose(self, caller: Caller, user: str | None) -> tuple[Variant, Mapping[str, str]]:
        """The forced variant, else the one of the bucket key, the user or the request, in this order.

        Also the arm of every experiment that led to it; a forced variant is in none.
        """
        traffic = self._deployment.traffic
        if caller.forced_variant is not None:
            if caller.forced_variant not in traffic.variants:
                known = ", ".join(traffic.variants)
                raise HeaderError(VARIANT_HEADER, f"{caller.forced_variant!r} is not one of {known}")
            return traffic.variants[caller.forced_variant], {}
        if caller.bucket_key is not None and len(caller.bucket_key) > MAX_BUCKET_KEY:
            raise HeaderError(BUCKET_HEADER, f"is longer than {MAX_BUCKET_KEY} characters")
        assigned = traffic.split.assign(caller.split_key(user))
        return traffic.variants[assigned.variant], assigned.arms

    async def search(self, request: SearchRequest, caller: Caller) -> Answer:
        """The answer to one search. Raises InputError for a variant that is not served."""
        started = time.perf_counter()
        variant, arms = self.choose(caller, request.user_id)
        deadline = time.monotonic() + self._deadline if caller.deadline is None else caller.deadline
        if self._results is None:  # else the answer may be known, which takes no slot
            self._admission.check(variant.engine.name, variant.options.width, request.limit, deadline)
        await self._catch_up()
        recalled = await self._memory.recall(request.user_id, request.query, variant.options.keywords)
        degraded: list[str] = [*recalled.degraded]
        spent = {"state": _ms_since(started)}
        context = recalled.state.context(request.query, recalled.keywords or ())
        filters = None if request.filters is None else request.filters.to_filters()
        # Known keywords are in the context; else the dictionary of the bundle is asked.
        options = variant.search_options(
            request.limit,
            keywords=variant.options.keywords and recalled.keywords is None,
            filters=filters,
            facets=request.facets,
            deadline=deadline,
        )
        find = self._run if request.explain or self._results is None else self._find
        found, width = await find(variant, context, options, spent)
        if width < options.width:
            degraded.append(NARROW_BEAM)
            options = replace(options, width=width)
        degraded += found.degraded
        spent["total"] = _ms_since(started)
        body: dict[str, Any] = {
            "request_id": caller.request_id,
            "query": request.query,
            "variant": variant.name,
            "model_version": found.model_version,
            "catalog_version": found.catalog_version,
            "keywords": found.keywords,
            "items": orjson.Fragment(found.items),
            "degraded": degraded,
            "timings_ms": spent,
        }
        if request.facets:
            body["facets"] = orjson.Fragment(found.facets)
        if request.explain:
            told = {"keyword_source": recalled.source, "experiments": arms}
            options = replace(options, keywords=variant.options.keywords)
            body["explain"] = _explain(context, options, found) | told
        self._metrics.search(variant.name, options.width, spent, degraded)
        key = None if caller.forced_variant else caller.split_key(request.user_id)
        self._memory.expose(exposure_of(body, found.ids, arms, key, request.user_id))
        return Answer(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), variant.name, spent)

    async def _find(
        self, variant: Variant, context: SearchContext, options: SearchOptions, spent: dict[str, float]
    ) -> tuple[Found, int]:
        """`_run`, unless the cache knows what it would find or an equal search is finding it."""
        results = self._results
        assert results is not None
        asked, version = time.perf_counter(), variant.engine.live.snapshot.version
        key = result_key(variant, version, self._deployment.rates.version, context, options)
        known = results.get(key, time.monotonic())
        spent["cache"] = _ms_since(asked)
        if known is not None:
            self._metrics.result("hit")
            return known, options.width

        async def run() -> Outcome:
            found, width = await self._run(variant, context, options, spent)
            if width == options.width and not found.degraded and found.catalog_version == version:
                results.put(key, found, time.monotonic())
            return found, width

        outcome, shared = await self._twins.once(key, run, options.deadline)
        self._metrics.result("shared" if shared else "miss")
        if shared:
            spent["queue"] = round(_ms_since(asked) - spent["cache"], 3)
        return outcome

    async def _run(
        self, variant: Variant, context: SearchContext, options: SearchOptions, spent: dict[str, float]
    ) -> tuple[Found, int]:
        """What the variant finds, and at which beam width; adds the time of each stage to `spent`."""
        asked, engine = time.perf_counter(), variant.engine
        async with self._admission.slot(engine.name, options.width, options.limit, options.deadline) as width:
            spent["queue"] = _ms_since(asked)
            given = options if width == options.width else replace(options, width=width)
            result = await engine.runner.search(context, given)
        spent |= result.timings_ms
        return _found(result, engine.model_version), width

    async def record(self, received: Sequence[EventRequest]) -> int:
        """Accept events; returns how many were new. Raises InputError for an item of no catalog, StateUnavailable."""
        for place, event in enumerate(received):
            if all(engine.live.snapshot.row_of(event.item_id) is None for engine in self._deployment.engines):
                field = "item_id" if len(received) == 1 else f"events.{place}.item_id"
                raise InputError(field, f"{event.item_id} is not in the catalog")
        now = time.time()
        new = await self._memory.record([event.to_event(now) for event in received])
        self._metrics.events((event.type for event in received), len(received) - new)
        return new

    async def set_profile(self, user: str, profile: ProfileRequest) -> None:
        """Remember what is known of a user. Raises StateUnavailable."""
        await self._memory.set_profile(user, profile_text(profile.gender, profile.age_bucket))

    async def forget(self, user: str) -> None:
        """Drop what is remembered of a user. Raises StateUnavailable."""
        await self._memory.forget(user)

    def catalog_version(self) -> str:
        """The version of the first bundle's items."""
        return self._deployment.engines[0].live.snapshot.version

    def item(self, item_id: int) -> bytes:
        """The JSON of one item with its SID, from the first bundle that has it. Raises NotFound."""
        for engine in self._deployment.engines:
            snapshot = engine.live.snapshot
            row = snapshot.row_of(item_id)
            if row is not None:
                fields = {
                    "sid": snapshot.sid(row).tolist(),
                    "published_at": snapshot.item(row).published_at or None,
                    "catalog_version": snapshot.version,
                }
                return spliced(fields, snapshot.item_json(row))
        raise NotFound(f"item {item_id} is not in the catalog")


def exposure_of(
    answer: Mapping[str, Any],
    ids: npt.NDArray[np.int64],
    arms: Mapping[str, str],
    key: str | None,
    user: str | None,
) -> Exposure:
    """The log entry of an answered search with items int64 [n]; key: what the split went by, None where a header
    forced the variant."""
    return Exposure(
        request_id=answer["request_id"],
        variant=answer["variant"],
        arms=dict(arms),
        bucket="" if key is None else hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        user_id=user,
        query=answer["query"],
        at=time.time(),
        items=tuple(ids.tolist()),
        latency_ms=answer["timings_ms"]["total"],
    )


def spliced(fields: Mapping[str, Any], item: bytes) -> bytes:
    """One JSON object: some fields, then those of a serialised object, which is not parsed."""
    return orjson.dumps(fields)[:-1] + b"," + item[1:]


def _found(result: SearchResult, model_version: str) -> Found:
    """A result as answers need it; model_version names the model where the result does not."""
    catalog, rows = result.catalog, result.rows
    # All SIDs are written at once and then taken apart, which is half the time of writing them one by one. Of no
    # rows there is one empty SID.
    sids = orjson.dumps(catalog.sids_at(rows), option=orjson.OPT_SERIALIZE_NUMPY)[2:-2].split(b"],[")
    items = [
        b'{"rank":%d,"score":%.6f,"sid":[%b],%b' % (rank, score, sid, catalog.item_json(row)[1:])
        for rank, (row, score, sid) in enumerate(
            zip(rows.tolist(), result.scores.tolist(), sids, strict=False), start=1
        )
    ]
    return Found(
        items=b"[" + b",".join(items) + b"]",
        ids=catalog.ids_at(rows),
        query_sid=result.query_sid,
        keywords=result.keywords,
        beams=result.beams,
        eligible=result.eligible,
        matched=result.matched,
        facets=orjson.dumps(result.facets) if result.facets else b"",
        degraded=result.degraded,
        model_version=result.model_version or model_version,
        catalog_version=catalog.version,
    )


def _explain(context: SearchContext, options: SearchOptions, found: Found) -> dict[str, Any]:
    filters = None
    if options.filters is not None:  # those that a request can name
        filters = {name: getattr(options.filters, name) for name in SearchFilters.model_fields}
    return {
        "query_sid": found.query_sid,
        "beams": found.beams,
        "eligible": found.eligible,
        "matched": found.matched,
        "options": {name: getattr(options, name) for name in ("width", "score", "keywords", "match")},
        "filters": filters,
        "history": {
            "queries": len(context.recent_queries),
            "clicks": len(context.long_clicks),
            "orders": len(context.long_orders),
        },
    }


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)
