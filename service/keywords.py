"""Keywords of queries, made near-line: what is known, what is asked for, and the cache a search reads it through.

A search never waits for keywords to be made. It looks two keys up, of the query and of the query with its user; what
is missing is enqueued once for the worker (`keyword_worker`), and the search does with what it has. An entry without
keywords is an answer, too: the query has none.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

import orjson

DAY = 86_400.0
PERSONAL_SECONDS = DAY  # a user's keywords follow their day (spec §4.6.5)
NEGATIVE_SECONDS = DAY
STALE_FACTOR = 2.0  # an entry is kept twice as long as it is fresh, so that a refresh never shows as a miss
MISS_SECONDS = 5.0  # how long a process takes a missing entry for missing before it asks the store again
MAX_JOBS = 100_000
DEAD_SECONDS = DAY


class Entry(NamedTuple):
    """Known keywords, best first, empty when the query has none; fresh until a time in Unix seconds."""

    keywords: tuple[str, ...]
    fresh_until: float


@dataclass(frozen=True)
class Job:
    """Keywords that somebody asked for at a time, for everybody or for one user.

    What the user did after `at` must not reach these keywords (spec §4.6.4).
    """

    query: str
    user: str | None
    at: float

    @property
    def key(self) -> str:
        """Key of the entry."""
        return entry_key(self.query, self.user)

    def to_json(self) -> bytes:
        """The job as the queue keeps it."""
        return orjson.dumps(asdict(self))


class Claim(NamedTuple):
    """A job lent to a worker, and how often it was lent, this time included."""

    job: Job
    attempts: int


class QueueState(NamedTuple):
    """Jobs that wait or are being worked on, jobs given up, and the age of the oldest waiting job in seconds."""

    waiting: int
    dead: int
    lag_seconds: float


def entry_key(query: str, user: str | None = None) -> str:
    """Key of the keywords of a normalised query. A hash: keys show in tools that must not show what users typed."""
    return hashlib.blake2b(f"{user or ''}\0{query}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def kept_until(entry: Entry, now: float) -> float:
    """When the store lets go of an entry."""
    return now + STALE_FACTOR * (entry.fresh_until - now)


class KeywordStore(Protocol):
    """Entries and the queue. Every method raises StateUnavailable when the store fails.

    The queue delivers at least once: a claimed job that is not settled comes back when its lease ends.
    """

    async def lookup(self, keys: Sequence[str], now: float) -> dict[str, Entry]:
        """The entries that are known of some keys."""
        ...

    async def enqueue(self, jobs: Sequence[Job], now: float) -> None:
        """Ask for keywords; a job whose key waits or was given up lately is not added, nor one to a full queue."""
        ...

    async def claim(self, limit: int, lease_seconds: float, now: float) -> list[Claim]:
        """Borrow due jobs, the longest waiting first; no other worker gets them before the lease ends."""
        ...

    async def finish(self, key: str, entries: Mapping[str, Entry], now: float) -> None:
        """Store entries and remove the job of a key."""
        ...

    async def retry(self, key: str, due: float) -> None:
        """Give a job back, to be claimed again from a time on."""
        ...

    async def bury(self, key: str, now: float) -> None:
        """Give a job up: it stays among the dead letters for a day."""
        ...

    async def queue(self, now: float) -> QueueState:
        """The length and age of the queue."""
        ...


class KeywordCache:
    """The least recently used entries of this process, over the store. Used on the event loop only."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: OrderedDict[str, tuple[Entry | None, float]] = OrderedDict()  # entry, when to ask again

    def get(self, key: str, now: float) -> tuple[Entry | None, bool]:
        """The entry of a key, None when there is none, and whether the store need not be asked."""
        entry, until = self._known.get(key, (None, 0.0))
        if now >= until:
            return None, False
        self._known.move_to_end(key)
        return entry, True

    def put(self, keys: Iterable[str], found: Mapping[str, Entry], now: float) -> list[str]:
        """Remember what the store said of keys; returns those that should be enqueued: missing or not fresh."""
        wanted = []
        for key in keys:
            entry = found.get(key)
            fresh = entry is not None and entry.fresh_until > now
            until = entry.fresh_until if entry is not None and fresh else now + MISS_SECONDS
            self._known[key] = (entry, until)
            self._known.move_to_end(key)
            if not fresh:
                wanted.append(key)
        while len(self._known) > self._size:
            self._known.popitem(last=False)
        return wanted
