"""The store as requests see it: one round trip per search, never waited for longer than its timeout.

State that fails or is slow costs a search its history, never its answer. Keywords come from the cache of this
process, else with the round trip; what is missing is asked for in the background (`keywords`).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from onesearch.rates import CalibratedRates
from onesearch.text import normalise
from service.breaker import Breaker
from service.events import Event, Exposure
from service.keywords import Entry, Job, KeywordCache, entry_key
from service.outbox import FLUSH_SECONDS, Outbox
from service.settings import Settings
from service.state import STATE_UNAVAILABLE, UNKNOWN_USER, Loss, StateUnavailable, UserState
from service.store import Store
from service.telemetry import Metrics

EVENTS_AT_ONCE = 100  # larger batches are applied in parts, so that searches get their turn between them
COUNTERS_AT_ONCE = 1000
logger = logging.getLogger("onesearch.store")


@dataclass(frozen=True)
class Recalled:
    """What is known for a search. keywords is None where none are known; they may be known to be none.

    source says whose keywords they are.
    """

    state: UserState
    keywords: tuple[str, ...] | None = None
    source: Literal["user", "query", "none"] = "none"
    degraded: tuple[Loss, ...] = ()


class Memory:
    """One process's access to a store, with what it runs in the background."""

    def __init__(self, store: Store, settings: Settings, metrics: Metrics, rates: CalibratedRates) -> None:
        """rates are kept up to date with the counters of the store."""
        self._store = store
        self._refresh_seconds = settings.rates_refresh_seconds
        self._metrics = metrics
        self._breaker = Breaker(store.ping, settings.state_timeout_ms / 1e3, metrics.breaker)
        self._cache = KeywordCache(settings.keyword_cache_size)
        self._write_timeout = settings.state_write_timeout_ms / 1e3
        self._outbox = Outbox(store, self._breaker, metrics, self._write_timeout)
        self._mark = 0
        self._closing = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._rates = rates

    async def recall(self, user: str | None, query: str, keywords: bool) -> Recalled:
        """What a search may know: the user's state before it and, if wanted, keywords. Records the query."""
        now, text = time.time(), normalise(query)
        keys = [entry_key(text)] if keywords else []
        if keywords and user is not None:
            keys.insert(0, entry_key(text, user))
        known = {key: self._cache.get(key, now) for key in keys}
        unknown = [key for key, (_, asked) in known.items() if not asked]
        found = {key: entry for key, (entry, asked) in known.items() if asked and entry is not None}
        if user is None and not unknown:
            return self._recalled(UserState(), keys, found, ())
        try:
            visit = await self._breaker.call(lambda: self._store.users.visit(user, query, unknown, now))
        except StateUnavailable:
            return self._recalled(UserState(), keys, found, () if user is None else (STATE_UNAVAILABLE,))
        # There is nothing to make a stranger's keywords of: those of the query are theirs.
        asked = [key for key in unknown if visit.state.known or key == keys[-1]]
        for key in self._cache.put(asked, visit.keywords, now):
            self._outbox.enqueue(Job(text, None if key == keys[-1] else user, now))
        lost: tuple[Loss, ...] = (UNKNOWN_USER,) if user is not None and not visit.state.known else ()
        return self._recalled(visit.state, keys, found | visit.keywords, lost)

    async def record(self, events: Sequence[Event]) -> int:
        """Log and apply events; returns how many were new. Raises StateUnavailable; sending again is safe."""
        new = 0
        for start in range(0, len(events), EVENTS_AT_ONCE):
            part = events[start : start + EVENTS_AT_ONCE]
            new += await self._breaker.call(partial(self._store.events.record, part), self._write_timeout)
        return new

    async def set_profile(self, user: str, profile: str) -> None:
        """Remember a user's profile. Raises StateUnavailable."""
        work = partial(self._store.users.set_profile, user, profile, time.time())
        await self._breaker.call(work, self._write_timeout)

    async def forget(self, user: str) -> None:
        """Drop a user's profile and histories. Raises StateUnavailable."""
        await self._breaker.call(partial(self._store.users.forget, user), self._write_timeout)

    def expose(self, exposure: Exposure) -> None:
        """Log an exposure soon."""
        self._outbox.expose(exposure)

    def start(self) -> None:
        """Begin the background work: deferred writes, and the refresh of rates and gauges."""
        for work, pause in ((self._outbox.flush, FLUSH_SECONDS), (self.refresh, self._refresh_seconds)):
            self._tasks.append(asyncio.create_task(self._repeat(work, pause)))

    async def close(self) -> None:
        """End the background work and write what still waits; the store is not used afterwards."""
        self._closing.set()
        await asyncio.gather(*self._tasks)
        await self._outbox.flush()
        await self._breaker.close()

    async def refresh(self) -> None:
        """Bring the items' rates and the gauges of the keyword queue up to date. Raises StateUnavailable."""
        while True:
            mark, counts = await self._breaker.call(
                lambda: self._store.events.counts(self._mark, COUNTERS_AT_ONCE)
            )
            self._mark = mark
            self._rates.update({item: (n.impressions, n.clicks, n.orders) for item, n in counts.items()})
            if len(counts) < COUNTERS_AT_ONCE:
                break
        self._metrics.queue(*await self._breaker.call(lambda: self._store.keywords.queue(time.time())))

    async def _repeat(self, work: Callable[[], Awaitable[None]], pause: float) -> None:
        while not self._closing.is_set():
            try:
                await work()
            except StateUnavailable:
                pass  # the breaker has told, and the next time comes
            except Exception:  # a fault in one round must not end all later ones
                logger.exception("background work failed")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), pause)

    def _recalled(
        self, state: UserState, keys: Sequence[str], found: Mapping[str, Entry], lost: tuple[Loss, ...]
    ) -> Recalled:
        """keys: of the user, if there is one, then of the query."""
        best = next((key for key in keys if key in found), None)
        if keys:
            self._metrics.keywords("missing" if best is None else "user" if best != keys[-1] else "query")
        if best is None:
            return Recalled(state, degraded=lost)
        return Recalled(state, found[best].keywords, "user" if best != keys[-1] else "query", lost)
