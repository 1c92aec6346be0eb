"""What the service remembers of users: their recent queries, recent clicks and long history, each with a time.

`StateStore` is the seam. Lists are bounded and run oldest to newest; entries older than the time to live are
forgotten. The embedded store keeps them in one SQLite file, the shared store in Redis; both give the same
answers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from onesearch.errors import OneSearchError

History = Literal["queries", "clicks", "long"]
# Queries and clicks hold more than a prompt shows (the renderer truncates); long holds what its vectors use.
LIMITS: dict[History, int] = {"queries": 20, "clicks": 50, "long": 100}
EventType = Literal["impression", "click", "cart", "order"]
# The histories an item event is appended to: clicks are recent behaviour, clicks and orders the long history.
EVENT_HISTORIES: dict[EventType, tuple[History, ...]] = {
    "impression": (),
    "click": ("clicks", "long"),
    "cart": (),
    "order": ("long",),
}


class StateUnavailable(OneSearchError):
    """The store cannot be reached, failed or took too long."""

    code = "state-unavailable"
    status = 503


class Stamped(NamedTuple):
    """One remembered thing and when it happened, in Unix seconds."""

    at: float
    value: str


@dataclass(frozen=True)
class UserState:
    """The histories of one user, oldest first; item histories hold item ids in decimal."""

    queries: tuple[Stamped, ...] = ()
    clicks: tuple[Stamped, ...] = ()
    long: tuple[Stamped, ...] = ()

    @property
    def known(self) -> bool:
        """Whether anything is remembered of this user."""
        return bool(self.queries or self.clicks or self.long)


class StateStore(Protocol):
    """User state. Every method raises StateUnavailable when the store fails."""

    async def read(self, user: str, now: float) -> UserState:
        """What is remembered of a user."""
        ...

    async def visit(self, user: str, query: str, now: float) -> UserState:
        """`read`, then append a query, in one round trip; the answer does not hold this query."""
        ...

    async def append(self, user: str, item_id: int, histories: Iterable[History], now: float) -> None:
        """Append an item to some histories of a user, all or none."""
        ...

    async def close(self) -> None:
        """Release the store; it is not used afterwards."""
        ...
