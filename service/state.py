"""What the service remembers of users: profile, recent queries, clicks and orders, with their times.

`StateStore` is the seam. Lists are bounded and run oldest to newest; entries older than the time to live are
forgotten. The embedded store keeps them in one SQLite file, the shared store in Redis; both give the same
answers. Items enter the histories through `events`, in the same act that logs the event.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from onesearch.context import KEPT_ITEMS, KEPT_QUERIES, SearchContext, assemble
from onesearch.errors import OneSearchError
from service.keywords import Entry

History = Literal["queries", "clicks", "orders"]
LIMITS: dict[History, int] = {"queries": KEPT_QUERIES, "clicks": KEPT_ITEMS, "orders": KEPT_ITEMS}

Loss = Literal["unknown_user", "state_unavailable"]
"""What a search of a user may have to do without: the user is new, or the store is away"""
UNKNOWN_USER: Loss = "unknown_user"
STATE_UNAVAILABLE: Loss = "state_unavailable"


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
    """The histories of one user, oldest first; item histories hold item ids in decimal. profile as prompts show it."""

    queries: tuple[Stamped, ...] = ()
    clicks: tuple[Stamped, ...] = ()
    orders: tuple[Stamped, ...] = ()
    profile: str = ""

    @property
    def known(self) -> bool:
        """Whether anything is remembered of this user."""
        return bool(self.queries or self.clicks or self.orders or self.profile)

    def before(self, at: float) -> "UserState":
        """What was remembered just before a time."""
        cut = {name: tuple(e for e in getattr(self, name) if e.at < at) for name in LIMITS}
        return UserState(**cut, profile=self.profile)

    def context(self, query: str, keywords: tuple[str, ...] = ()) -> SearchContext:
        """The context of a search by the shared rule."""
        return assemble(
            query,
            [entry.value for entry in self.queries],
            [int(entry.value) for entry in self.clicks],
            [int(entry.value) for entry in self.orders],
            self.profile,
            keywords,
        )


class Visit(NamedTuple):
    """What a search needs of the store: the user's state before it, and the keyword entries it asked for."""

    state: UserState
    keywords: dict[str, Entry]


class StateStore(Protocol):
    """User state. Every method raises StateUnavailable when the store fails."""

    async def read(self, user: str, now: float) -> UserState:
        """What is remembered of a user."""
        ...

    async def visit(self, user: str | None, query: str, keys: Sequence[str], now: float) -> Visit:
        """`read`, look up keyword keys, then append the query, all in one round trip.

        The state does not hold this query. Without a user nothing is read or appended but the keyword entries.
        """
        ...

    async def set_profile(self, user: str, profile: str, now: float) -> None:
        """Remember a profile in the place of the former one; an empty one forgets it."""
        ...

    async def forget(self, user: str) -> None:
        """Drop the profile and the histories of a user."""
        ...
