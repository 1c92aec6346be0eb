"""What happens between HTTP and the parts behind it: state, variant, context, inference, answer."""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import orjson

from onesearch.context import SearchContext, assemble
from onesearch.errors import InputError
from onesearch.search import SearchOptions, SearchResult
from service.admission import NARROW_BEAM, Admission
from service.deployment import Deployment, Variant
from service.problems import HeaderError, NotFound
from service.schemas import EventRequest, SearchRequest
from service.settings import Settings
from service.state import EVENT_HISTORIES, StateStore, StateUnavailable, UserState
from service.telemetry import Metrics

T = TypeVar("T")

VARIANT_HEADER = "X-OneSearch-Variant"
DEADLINE_HEADER = "X-OneSearch-Deadline-Ms"
MAX_DEADLINE_MS = 60_000
BUCKET_HEADER = "X-OneSearch-Bucket-Key"
MAX_BUCKET_KEY = 256
UNKNOWN_USER, STATE_UNAVAILABLE = "unknown_user", "state_unavailable"


@dataclass(frozen=True)
class Caller:
    """What the headers of a request say: its id, a variant to force, the key of the split, its deadline.

    deadline: the `time.monotonic()` after which the answer is of no use; None for the default of the service.
    """

    request_id: str
    forced_variant: str | None = None
    bucket_key: str | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Answer:
    """A finished search: the JSON body, the variant that answered and the time of each stage."""

    body: bytes
    variant: str
    timings_ms: Mapping[str, float]


class Pipeline:
    """Answers searches and records events. State that fails or is slow costs its history, never the search."""

    def __init__(self, deployment: Deployment, store: StateStore, settings: Settings, metrics: Metrics) -> None:
        self._deployment = deployment
        self._store = store
        self._timeout = settings.state_timeout_ms / 1e3
        self._deadline = settings.deadline_ms / 1e3
        self._admission = Admission(settings.concurrency, settings.queue_limit, metrics.load)
        self._metrics = metrics

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
        assigned = traffic.split.assign(caller.bucket_key or user or caller.request_id)
        return traffic.variants[assigned.variant], assigned.arms

    async def search(self, request: SearchRequest, caller: Caller) -> Answer:
        """The answer to one search. Raises InputError for a variant that is not served."""
        started = time.perf_counter()
        variant, arms = self.choose(caller, request.user_id)
        deadline = time.monotonic() + self._deadline if caller.deadline is None else caller.deadline
        history, degraded = await self._history(request)
        spent = {"state": _ms_since(started)}
        context = context_of(request.query, history)
        filters = None if request.filters is None else request.filters.to_filters()
        options = variant.search_options(request.limit, filters=filters, deadline=deadline)
        asked = time.perf_counter()
        async with self._admission.slot(variant.engine.name, options.width, options.limit, deadline) as width:
            spent["queue"] = _ms_since(asked)
            if width < options.width:
                degraded.append(NARROW_BEAM)
            options = replace(options, width=width)
            result = await variant.engine.runner.search(context, options)
        spent |= result.timings_ms | {"total": _ms_since(started)}
        body = {
            "request_id": caller.request_id,
            "query": request.query,
            "variant": variant.name,
            "model_version": variant.engine.model_version,
            "catalog_version": result.catalog.version,
            "keywords": result.keywords,
            "items": _items(result),
            "degraded": degraded,
            "timings_ms": spent,
        }
        if request.explain:
            body["explain"] = _explain(context, options, result) | {"experiments": arms}
        self._metrics.search(variant.name, options.width, spent, degraded)
        return Answer(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), variant.name, spent)

    async def record(self, event: EventRequest) -> None:
        """Accept one event. Raises InputError for an item of no catalog and StateUnavailable."""
        if all(engine.live.snapshot.row_of(event.item_id) is None for engine in self._deployment.engines):
            raise InputError("item_id", f"{event.item_id} is not in the catalog")
        histories = EVENT_HISTORIES[event.type]
        if histories:
            await self._in_time(self._store.append(event.user_id, event.item_id, histories, time.time()))
        self._metrics.event(event.type)

    def item(self, item_id: int) -> bytes:
        """The JSON of one item with its SID, from the first bundle that has it. Raises NotFound."""
        for engine in self._deployment.engines:
            snapshot = engine.live.snapshot
            rows = snapshot.rows_of([item_id])
            if len(rows):
                return spliced({"sid": snapshot.sids_at(rows)[0].tolist()}, snapshot.item_json(int(rows[0])))
        raise NotFound(f"item {item_id} is not in the catalog")

    async def _history(self, request: SearchRequest) -> tuple[UserState, list[str]]:
        """What is known of the user, and what the search has to do without. Records the query."""
        if request.user_id is None:
            return UserState(), []
        try:
            state = await self._in_time(self._store.visit(request.user_id, request.query, time.time()))
        except StateUnavailable:
            return UserState(), [STATE_UNAVAILABLE]
        return state, [] if state.known else [UNKNOWN_USER]

    async def _in_time(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout):
                return await work
        except TimeoutError as error:
            raise StateUnavailable(f"state: took longer than {self._timeout} s") from error


def context_of(query: str, history: UserState) -> SearchContext:
    """The context of a search by the shared rule."""
    return assemble(
        query,
        [entry.value for entry in history.queries],
        [int(entry.value) for entry in history.clicks],
        [int(entry.value) for entry in history.long],
    )


def spliced(fields: Mapping[str, Any], item: bytes) -> bytes:
    """One JSON object: some fields, then those of a serialised object, which is not parsed."""
    return orjson.dumps(fields)[:-1] + b"," + item[1:]


def _items(result: SearchResult) -> list[orjson.Fragment]:
    catalog, rows = result.catalog, result.rows
    found = zip(rows.tolist(), result.scores.tolist(), catalog.sids_at(rows).tolist(), strict=True)
    return [
        orjson.Fragment(spliced({"rank": i, "score": round(score, 6), "sid": sid}, catalog.item_json(row)))
        for i, (row, score, sid) in enumerate(found, start=1)
    ]


def _explain(context: SearchContext, options: SearchOptions, result: SearchResult) -> dict[str, Any]:
    return {
        "query_sid": result.query_sid,
        "beams": result.beams,
        "eligible": result.eligible,
        "options": {"width": options.width, "score": options.score, "keywords": options.keywords},
        "filters": None if options.filters is None else asdict(options.filters),
        "history": {
            "queries": len(context.recent_queries),
            "clicks": len(context.recent_items),
            "long": len(context.long_items),
        },
    }


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)
