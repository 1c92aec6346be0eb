"""Answers that may be given again: a bounded cache in this process of what searches found, and what runs right now.

Its key is everything an answer follows from, so that no entry is ever wrong and nothing must be invalidated: the
variant and its model, the catalog's version, the rates that order the items of a SID, the context (query, history,
keywords) and the options. Entries end after `FRESH_SECONDS` all the same: a model on a server may change unseen.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onesearch.context import SearchContext
from onesearch.errors import DeadlineError
from onesearch.search import SearchOptions
from onesearch.sid import Codes
from service.deployment import Variant

FRESH_SECONDS = 30.0
MAX_BYTES = 64 * 1024 * 1024
ENTRY_BYTES = 2 * 1024  # about what the keywords, the versions and the bookkeeping of an entry take


@dataclass(frozen=True)
class Found:
    """What a search found: the part of its answer that is the same for every request that asks the same.

    items: the JSON of all items; ids: theirs, int64 [n]; facets: JSON, empty where they were not asked for. The rest
    is as in `SearchResult`.
    """

    items: bytes
    ids: npt.NDArray[np.int64]
    query_sid: Codes
    keywords: tuple[str, ...]
    beams: tuple[int, ...]
    eligible: int
    matched: int
    facets: bytes
    degraded: tuple[str, ...]
    model_version: str
    catalog_version: str


def result_key(
    variant: Variant, catalog_version: str, rates_version: int, context: SearchContext, options: SearchOptions
) -> bytes:
    """The key of what a search finds; the deadline of the options is no part of it."""
    engine = variant.engine
    parts = (variant.name, engine.name, engine.model_version, catalog_version, rates_version, context, options)
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


Outcome = tuple[Found, int]
"""What a search found and the beam width it had."""


class Twins:
    """Searches that run now: equal ones wait for the first of them instead of running too. On the event loop only."""

    def __init__(self) -> None:
        self._running: dict[bytes, asyncio.Future[Outcome | None]] = {}

    async def once(
        self, key: bytes, run: Callable[[], Awaitable[Outcome]], deadline: float
    ) -> tuple[Outcome, bool]:
        """The outcome of a search and whether it was another's, which ran already under the same key.

        deadline: `time.monotonic()`. A search that fails is told to nobody else: the next in line runs for itself.
        Raises what `run` raises, and DeadlineError when the deadline passes meanwhile.
        """
        while (running := self._running.get(key)) is not None:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    outcome = await asyncio.shield(running)
            except TimeoutError:
                raise DeadlineError("the deadline passed while an equal search ran") from None
            if outcome is not None:
                return outcome, True
        mine = self._running[key] = asyncio.get_running_loop().create_future()
        outcome = None
        try:
            outcome = await run()
            return outcome, False
        finally:
            del self._running[key]
            mine.set_result(outcome)


class ResultCache:
    """The answers used last, bounded in number and in bytes. Used on the event loop only."""

    def __init__(self, entries: int, max_bytes: int = MAX_BYTES) -> None:
        self._entries, self._max_bytes, self._bytes = entries, max_bytes, 0
        self._known: OrderedDict[bytes, tuple[Found, float]] = OrderedDict()  # what was found, when it ends

    def get(self, key: bytes, now: float) -> Found | None:
        """What is known under a key at a time in seconds."""
        found, until = self._known.get(key, (None, 0.0))
        if found is None or now >= until:
            return None
        self._known.move_to_end(key)
        return found

    def put(self, key: bytes, found: Found, now: float) -> None:
        """Remember what was found, and let go of what was used longest ago. Too large an answer is not kept."""
        self._drop(key)
        if _size(found) > self._max_bytes:
            return
        self._known[key] = (found, now + FRESH_SECONDS)
        self._bytes += _size(found)
        while len(self._known) > self._entries or self._bytes > self._max_bytes:
            self._drop(next(iter(self._known)))

    def _drop(self, key: bytes) -> None:
        if key in self._known:
            found, _ = self._known.pop(key)
            self._bytes -= _size(found)


def _size(found: Found) -> int:
    return len(found.items) + len(found.facets) + found.ids.nbytes + ENTRY_BYTES
