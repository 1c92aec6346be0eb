"""The HTTP routes: from requests to the pipeline and back, no logic of their own."""

from collections.abc import MutableMapping
from http import HTTPStatus
from pathlib import Path as FilePath
from typing import Annotated, Any, TypedDict, cast

import orjson
from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import SecretStr
from starlette.responses import FileResponse, PlainTextResponse

from service.deployment import Deployment
from service.direct import ANSWER_HEADERS, RawHeaders
from service.item_schemas import LiveItem
from service.items import Items
from service.pipeline import BUCKET_HEADER, DEADLINE_HEADER, MAX_DEADLINE_MS, VARIANT_HEADER, Caller, Pipeline
from service.problems import MEDIA_TYPE, HeaderError
from service.readiness import Readiness
from service.schemas import (
    BundleCatalog,
    CatalogInfo,
    EventAnswer,
    EventBatch,
    EventRequest,
    EventsBody,
    ExperimentInfo,
    Problem,
    ProfileRequest,
    SearchAnswer,
    SearchParameters,
    SearchRequest,
    UserId,
    VariantInfo,
    VariantList,
)
from service.telemetry import Metrics

PAGE = FilePath(__file__).with_name("page")
_JSON = "application/json"


class Parts(TypedDict):
    """The lifespan state: what routes reach through `request.state`."""

    deployment: Deployment
    pipeline: Pipeline
    readiness: Readiness
    metrics: Metrics
    items: Items
    admin_key: SecretStr | None


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of the problems that a route may answer with."""
    content = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def answers(model: type[Any], *problems: int, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of an answer and of the problems instead of it."""
    return {status: {"model": model}, **_problems(*problems)}


_HEADERS = {
    "parameters": [
        {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
        for name, text, schema in (
            (VARIANT_HEADER, "forces a variant", {"type": "string"}),
            (BUCKET_HEADER, "key of the sticky split", {"type": "string"}),
            (
                DEADLINE_HEADER,
                "milliseconds after which the answer is of no use",
                {"type": "integer", "minimum": 1, "maximum": MAX_DEADLINE_MS},
            ),
        )
    ]
}
router = APIRouter()


# Headers and parts are read from the request, not injected: resolving dependencies costs more than a search's
# own bookkeeping.
def _pipeline(request: Request) -> Pipeline:
    return cast(Pipeline, request.state.pipeline)


def _items(request: Request) -> Items:
    return cast(Items, request.state.items)


def _deadline(given: str | None, arrived: float) -> float | None:
    """The `time.monotonic()` until which the caller waits, from the header's milliseconds."""
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= 5 and 1 <= int(given) <= MAX_DEADLINE_MS):
        raise HeaderError(
            DEADLINE_HEADER, f"{given[:64]!r} is not a number of milliseconds, 1 to {MAX_DEADLINE_MS}"
        )
    return arrived + int(given) / 1e3


def _header(headers: RawHeaders, name: str) -> str | None:
    given = headers.get(name.lower().encode())
    return None if given is None else given.decode("latin-1")


async def find(state: MutableMapping[str, Any], headers: RawHeaders, asked: SearchRequest) -> bytes:
    """The JSON that answers a search; the state of its scope has the `Parts` and gets what the envelope tells."""
    deadline = _deadline(_header(headers, DEADLINE_HEADER), state["arrived"])
    forced, bucket = _header(headers, VARIANT_HEADER), _header(headers, BUCKET_HEADER)
    pipeline: Pipeline = state["pipeline"]
    answer = await pipeline.search(asked, Caller(state["request_id"], forced, bucket, deadline))
    state["variant"], state["timings_ms"] = answer.variant, answer.timings_ms
    return answer.body


async def _search(request: Request, asked: SearchRequest) -> Response:
    body = await find(request.scope["state"], dict(request.headers.raw), asked)
    return Response(body, headers={name.decode(): value.decode() for name, value in ANSWER_HEADERS})


@router.post(
    "/v1/search",
    tags=["search"],
    summary="Search",
    openapi_extra=_HEADERS,
    responses=answers(SearchAnswer, 400, 413, 415, 422, 429, 503),
)
async def search(request: Request, body: SearchRequest) -> Response:
    """Ranked items for a query, personalised by the user's history."""
    return await _search(request, body)


@router.get(
    "/v1/search",
    tags=["search"],
    summary="Search, for a browser",
    openapi_extra=_HEADERS,
    responses=answers(SearchAnswer, 400, 422, 429, 503),
)
async def search_by_url(request: Request, given: Annotated[SearchParameters, Query()]) -> Response:
    """The same answer as `POST /v1/search`."""
    return await _search(request, given.to_request())


@router.post(
    "/v1/events",
    tags=["events"],
    summary="Record events",
    status_code=202,
    responses=answers(EventAnswer, 400, 413, 415, 422, 429, 503, status=202),
)
async def record(request: Request, body: EventsBody) -> Response:
    """One event, a list of events, or `{"events": [...]}`, at most 1,000. Clicks and orders enter the user's history.

    After a 503 or a lost answer send the same events again: those with an `event_id` count once.
    """
    events = [body] if isinstance(body, EventRequest) else body.events if isinstance(body, EventBatch) else body
    new = await _pipeline(request).record(events)
    answer = {"request_id": request.state.request_id, "accepted": len(events), "repeated": len(events) - new}
    return Response(orjson.dumps(answer), status_code=202, media_type=_JSON)


@router.put(
    "/v1/users/{user_id}",
    tags=["events"],
    summary="Set a user's profile",
    status_code=204,
    responses=_problems(400, 413, 415, 422, 503),
)
async def set_profile(request: Request, user_id: UserId, body: ProfileRequest) -> Response:
    """The profile that personalises this user's searches, in the place of the former one."""
    await _pipeline(request).set_profile(user_id, body)
    return Response(status_code=204)


@router.delete(
    "/v1/users/{user_id}",
    tags=["events"],
    summary="Forget a user",
    status_code=204,
    responses=_problems(422, 503),
)
async def forget(request: Request, user_id: UserId) -> Response:
    """Drop the user's profile and histories; log entries go when their retention ends."""
    await _pipeline(request).forget(user_id)
    return Response(status_code=204)


@router.get("/v1/items/{item_id}", tags=["catalog"], summary="Item", responses=answers(LiveItem, 404, 422))
async def item(request: Request, item_id: Annotated[int, Path(ge=0, le=2**63 - 1)]) -> Response:
    """One item as it is served now, with its SID."""
    await _items(request).catch_up()
    return Response(_pipeline(request).item(item_id), media_type=_JSON)


@router.get("/v1/variants", tags=["search"], summary="Variants")
async def variants(request: Request) -> VariantList:
    """The variants that split the traffic, what each one runs, and the experiments that lead to them."""
    traffic = request.state.deployment.traffic
    return VariantList(
        variants=[
            VariantInfo(
                name=v.name,
                bundle=v.engine.name,
                share=round(traffic.split.shares[v.name], 6),
                keywords=v.options.keywords,
                width=v.options.width,
                score=v.options.score,
                model_version=v.engine.model_version,
                catalog_version=v.engine.live.snapshot.version,
            )
            for v in traffic.variants.values()
        ],
        experiments=[
            ExperimentInfo(name=name, **e.model_dump(), traffic=round(e.traffic, 6))
            for name, e in traffic.split.experiments.items()
        ],
    )


@router.get("/v1/catalog", tags=["catalog"], summary="Catalog")
async def catalog(request: Request) -> CatalogInfo:
    """Size, categories and example queries of the first bundle; version and size of every bundle's catalog."""
    await _items(request).catch_up()
    engine = request.state.deployment.engines[0]
    snapshot = engine.live.snapshot
    return CatalogInfo(
        catalog_version=snapshot.version,
        items=snapshot.num_items,
        categories=snapshot.categories,
        examples=list(engine.examples),
        bundles=[
            BundleCatalog(
                name=engine.name,
                catalog_version=engine.live.snapshot.version,
                items=engine.live.snapshot.num_items,
                changed=engine.live.pending,
            )
            for engine in request.state.deployment.engines
        ],
    )


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", tags=["operations"], summary="Liveness")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "alive"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", tags=["operations"], summary="Readiness", responses={503: {"description": "Not ready"}})
async def readyz(request: Request) -> Response:
    """Whether every variant finds what its bundle's golden examples say; 503 with reasons otherwise."""
    readiness: Readiness = request.state.readiness
    named = request.state.deployment.variants.items()
    body = {
        "status": "draining" if readiness.draining else "ready" if readiness.ready else "not ready",
        "variants": {name: readiness.states[variant.engine.name] for name, variant in named},
    }
    return Response(orjson.dumps(body), status_code=200 if readiness.ready else 503, media_type=_JSON)


@router.get("/metrics", tags=["operations"], summary="Prometheus metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Metrics in the Prometheus text format."""
    measured: Metrics = request.state.metrics
    return Response(measured.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.head("/", include_in_schema=False)
@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The search page."""
    return FileResponse(PAGE / "index.html")


@router.get("/docs", include_in_schema=False)
async def docs() -> FileResponse:
    """The API described for people; it reads `/openapi.json` and nothing from other hosts."""
    return FileResponse(PAGE / "docs.html")
