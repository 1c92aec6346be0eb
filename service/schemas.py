"""Request and response bodies of the HTTP API, and what they accept. Unknown fields are errors everywhere."""

import re
import uuid
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
)

from onesearch.catalog import Filters
from onesearch.context import AgeBucket, Gender
from onesearch.facets import Facets
from onesearch.text import MAX_QUERY_CHARS, normalise
from service.events import Event, EventType
from service.state import Loss

MAX_LIMIT = 200
MAX_EXCLUDED = 1000
MAX_EVENTS = 1000
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def plain(text: str) -> str:
    # Lone surrogates are no text and cannot be sent back.
    if _CONTROL.search(text):
        raise ValueError("has control characters")
    return text


def readable(text: str) -> str:
    if not normalise(plain(text)):
        raise ValueError("is empty")
    return text


def _user_key(value: object) -> object:
    return str(value) if type(value) is int else value


def _seconds(value: object) -> object:
    """Unix seconds of an ISO 8601 date or time, UTC unless it says otherwise; in a query string also plain digits."""
    if not isinstance(value, str):
        return value
    if value.isdecimal():
        return int(value)
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("is neither Unix seconds nor an ISO 8601 date or time") from None
    return int(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp())


def _not_below_minimum(price_max: float | None, info: ValidationInfo) -> float | None:
    price_min = info.data.get("price_min")
    if price_min is not None and price_max is not None and price_min > price_max:
        raise ValueError("is below price_min")
    return price_max


Query = Annotated[str, StringConstraints(strict=True, max_length=MAX_QUERY_CHARS), AfterValidator(readable)]
Name = Annotated[str, StringConstraints(strict=True, max_length=256), AfterValidator(readable)]
# Ids of users are opaque: 42 and "42" are the same user.
UserId = Annotated[
    str,
    StringConstraints(strict=True, max_length=128),
    AfterValidator(readable),
    BeforeValidator(_user_key, json_schema_input_type=str | int),
]
RequestId = Annotated[str, StringConstraints(strict=True, max_length=64), AfterValidator(plain)]
EventId = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64), AfterValidator(plain)]
ItemId = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
Moment = Annotated[
    int,
    Field(strict=True, ge=0, le=2**53),
    BeforeValidator(_seconds, json_schema_input_type=int | datetime | date),
]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
StrictPrice = Annotated[Price, Field(strict=True)]
AboveMinimum = AfterValidator(_not_below_minimum)
Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]


class Body(BaseModel):
    """What a request may hold; anything else is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SearchFilters(Body):
    """What every returned item must satisfy; names compare without case, price bounds are inclusive."""

    category: Name | None = Field(default=None, description="a category of any level")
    brand: Name | None = None
    price_min: StrictPrice | None = None
    price_max: Annotated[StrictPrice | None, AboveMinimum] = None
    in_stock: Annotated[bool, Field(strict=True)] | None = None
    published_after: Moment | None = Field(default=None, description="Unix seconds, or an ISO 8601 date or time")
    exclude_items: Annotated[list[ItemId], Field(max_length=MAX_EXCLUDED)] = []

    def to_filters(self) -> Filters | None:
        """The catalog's filters, None when nothing is demanded."""
        filters = Filters(**{**self.model_dump(), "exclude_items": tuple(self.exclude_items)})
        return None if filters == Filters() else filters


class SearchRequest(Body):
    """Body of `POST /v1/search`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "running shoes", "limit": 5, "filters": {"in_stock": True}}]}
    )

    query: Query = Field(description="what the user typed")
    user_id: UserId | None = Field(default=None, description="whose history personalises the results")
    limit: Annotated[Limit, Field(strict=True)] = 20
    filters: SearchFilters | None = None
    facets: Annotated[bool, Field(strict=True, description="count the candidates of the search")] = False
    explain: Annotated[bool, Field(strict=True)] = False


_FILTERS = {name for name in SearchFilters.model_fields if name != "exclude_items"}


class SearchParameters(Body):
    """Query string of `GET /v1/search`: the same request for a browser, with the filters side by side."""

    q: Query = Field(description="what the user typed")
    user_id: UserId | None = None
    limit: Limit = 20
    category: Name | None = None
    brand: Name | None = None
    price_min: Price | None = None
    price_max: Annotated[Price | None, AboveMinimum] = None
    in_stock: bool | None = None
    published_after: Moment | None = None
    facets: bool = False
    explain: bool = False

    def to_request(self) -> SearchRequest:
        """The same request as a body."""
        own = self.model_dump(include={"user_id", "limit", "facets", "explain"})
        filters = self.model_dump(include=_FILTERS)
        return SearchRequest(query=self.q, filters=SearchFilters(**filters), **own)


class EventRequest(Body):
    """Something a user did with an item; an event sent again under the same event_id counts once.

    request_id, query and variant say where the item was seen; price is that of one piece.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"type": "click", "item_id": 17, "user_id": "u-42", "event_id": "e-7", "request_id": "r-1"}
            ]
        }
    )

    type: EventType
    item_id: ItemId
    user_id: UserId
    event_id: EventId | None = None
    request_id: RequestId | None = None
    query: Query | None = None
    variant: Annotated[str, StringConstraints(strict=True, max_length=64), AfterValidator(readable)] | None = None
    price: StrictPrice | None = None
    quantity: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 1

    def to_event(self, now: float) -> Event:
        """The event as received at a time, with an id of its own if it came without."""
        return Event(**self.model_dump(exclude={"event_id"}), at=now, event_id=self.event_id or uuid.uuid4().hex)


EventList = Annotated[list[EventRequest], Field(min_length=1, max_length=MAX_EVENTS)]


class EventBatch(Body):
    """Several events; one that is wrong refuses them all."""

    events: EventList


def _event_form(body: Any) -> str:
    if isinstance(body, list):
        return LIST_FORM
    return BATCH_FORM if isinstance(body, dict) and "events" in body else SINGLE_FORM


# The forms that the body of `POST /v1/events` may have. Their names are no part of a field's path.
SINGLE_FORM, BATCH_FORM, LIST_FORM = "(event)", "(batch)", "(list)"
EventsBody = Annotated[
    Annotated[EventRequest, Tag(SINGLE_FORM)]
    | Annotated[EventBatch, Tag(BATCH_FORM)]
    | Annotated[EventList, Tag(LIST_FORM)],
    Discriminator(_event_form),
]


class ProfileRequest(Body):
    """Body of `PUT /v1/users/{user_id}`: what prompts may say of a user, in the words of the training tables."""

    gender: Gender | None = None
    age_bucket: AgeBucket | None = None


class CatalogItem(BaseModel):
    """One item with its SID."""

    model_config = ConfigDict(extra="allow")

    sid: list[int]
    item_id: int
    title: str
    brand: str | None
    category: list[str]
    price: float | None
    image_url: str | None
    in_stock: bool
    attributes: dict[str, object]


class FoundItem(CatalogItem):
    """One result: an item with its rank, from 1, and the log-probability of its SID."""

    rank: int
    score: float


class SearchAnswer(BaseModel):
    """Answer of a search. degraded says what it went without or, under load, got less of.

    facets count the candidates that the search looked at after filters, not the whole catalog.
    """

    request_id: str
    query: str
    variant: str
    model_version: str
    catalog_version: str
    keywords: list[str]
    items: list[FoundItem]
    degraded: list[Loss | Literal["narrow_beam"]]
    timings_ms: dict[str, float]
    facets: Facets | None = None
    explain: dict[str, object] | None = None


class EventAnswer(BaseModel):
    """Answer of `POST /v1/events`: accepted events are in the log; `repeated` of them were there already."""

    request_id: str
    accepted: int
    repeated: int


class VariantInfo(BaseModel):
    """One variant as `GET /v1/variants` lists it; share is its part of the traffic."""

    name: str
    bundle: str
    share: float
    keywords: bool
    width: int
    score: str
    model_version: str
    catalog_version: str


class ExperimentInfo(BaseModel):
    """One experiment: its arms with their weights, its layer and slot, and the share of all users that take part."""

    name: str
    layer: str
    slot: tuple[float, float]
    ramp: float
    enabled: bool
    arms: dict[str, float]
    traffic: float


class VariantList(BaseModel):
    """Answer of `GET /v1/variants`."""

    variants: list[VariantInfo]
    experiments: list[ExperimentInfo]


class BundleCatalog(BaseModel):
    """The live catalog of one bundle. changed: items that differ from the version it was last compacted to."""

    name: str
    catalog_version: str
    items: int
    changed: int


class CatalogInfo(BaseModel):
    """What a search page needs to know of the first bundle's catalog, and the state of every bundle's."""

    catalog_version: str
    items: int
    categories: list[str]
    examples: list[str]
    bundles: list[BundleCatalog]


class Problem(BaseModel):
    """An error (RFC 9457), sent as application/problem+json.

    instance is the request id; errors name the wrong fields as dotted paths.
    """

    type: str
    title: str
    status: int
    detail: str
    instance: str
    errors: list[dict[Literal["field", "message"], str]] = []
