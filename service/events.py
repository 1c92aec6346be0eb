"""What happened: user events and search exposures in one durable log, and the item counters that follow from it.

`EventLog` is the seam. Recording an event is one atomic act: it enters the log, the user's histories and the item's
counters, or nothing happens. So there is no moment between accepting and applying at which a crash could lose or
double it, and an event sent again under the same id changes nothing.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple, Protocol

import orjson

from service.state import History

EventType = Literal["impression", "click", "cart", "order"]
EVENT_TYPES: tuple[EventType, ...] = ("impression", "click", "cart", "order")
# The history an event is appended to, if any.
EVENT_HISTORIES: dict[EventType, History] = {"click": "clicks", "order": "orders"}


@dataclass(frozen=True)
class Event:
    """Something a user did with an item. at is the time of receipt in Unix seconds.

    request_id, query and variant say where the item was seen; price is that of one piece.
    """

    event_id: str
    type: EventType
    item_id: int
    user_id: str
    at: float
    request_id: str | None = None
    query: str | None = None
    variant: str | None = None
    price: float | None = None
    quantity: int = 1

    def to_json(self) -> bytes:
        """The body of its log entry."""
        return orjson.dumps(self)


@dataclass(frozen=True)
class Exposure:
    """One answered search: which variant showed which items to whom.

    arms: experiment → arm; bucket is a hash of the split key, empty where a header forced the variant.
    """

    request_id: str
    variant: str
    arms: dict[str, str]
    bucket: str
    user_id: str | None
    query: str
    at: float
    items: tuple[int, ...]
    latency_ms: float

    def to_json(self) -> bytes:
        """The body of its log entry."""
        return orjson.dumps(self)


class Logged(NamedTuple):
    """One log entry. position orders the log and is where reading goes on; body is JSON."""

    position: str
    kind: Literal["event", "exposure"]
    body: bytes


class Counts(NamedTuple):
    """How often an item was shown, clicked, put into a cart and ordered, as far as events tell."""

    impressions: int = 0
    clicks: int = 0
    carts: int = 0
    orders: int = 0


class EventLog(Protocol):
    """The durable log. Every method raises StateUnavailable when the store fails."""

    async def record(self, events: Sequence[Event]) -> int:
        """Log and apply events in one act; returns how many were new."""
        ...

    async def expose(self, exposures: Sequence[Exposure]) -> None:
        """Log exposures, and let go of entries past their retention."""
        ...

    async def entries(self, after: str, limit: int) -> list[Logged]:
        """At most `limit` entries behind a position, oldest first; the position "" is the start."""
        ...

    async def counts(self, since: int, limit: int) -> tuple[int, dict[int, Counts]]:
        """At most `limit` items whose counters changed after a mark, by item id, and the mark to go on from.

        The mark 0 is the start.
        """
        ...


async def read_entries(log: EventLog, batch: int = 5_000) -> AsyncIterator[Event | Exposure]:
    """Every entry of a log, oldest first. Raises StateUnavailable."""
    position = ""
    while found := await log.entries(position, batch):
        for entry in found:
            raw = orjson.loads(entry.body)
            yield Event(**raw) if entry.kind == "event" else Exposure(**{**raw, "items": tuple(raw["items"])})
        position = found[-1].position


def period(since: datetime | None, until: datetime | None) -> tuple[float, float]:
    """Unix seconds of the first moment of a period and of the first one after it, both in UTC; None leaves it open."""
    first = 0.0 if since is None else since.replace(tzinfo=UTC).timestamp()
    return first, float("inf") if until is None else until.replace(tzinfo=UTC).timestamp()
