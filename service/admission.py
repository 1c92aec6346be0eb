"""Admission: which searches start, when, and how wide.

At most `concurrency` searches run and one more is at hand, so that a thread that gets free goes on without asking the
event loop first; the others wait in one bounded queue, first come first served. A search that cannot be answered
before its deadline is turned away at once, because work that comes too late costs the ones behind it. Before anything
is turned away beams get narrower: each half round of searches that wait costs one rung of the ladder (width, width/2,
width/4), which keeps the queue short when it is still cheap to do so. The pressure of a burst fades over `_MEMORY`
seconds: wide beams in the middle of a burst would only let the queue grow again.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager

from onesearch.errors import DeadlineError
from service.problems import Refused

NARROW_BEAM = "narrow_beam"
_RUNGS = 3
_AT_HAND = 1
_MEMORY = 0.5
_WEIGHT = 0.1
_MARGIN = 2.0  # estimates are means: twice as much is planned for


class Overloaded(Refused):
    """The queue is full, or too long for the deadline of the search."""

    code = "overloaded"
    status = 503


class ServiceTimes:
    """Exponentially weighted means of how long searches take, in seconds, per kind and width."""

    def __init__(self) -> None:
        self._means: dict[tuple[Hashable, int], float] = {}

    def estimate(self, kind: Hashable, width: int) -> float:
        """The expected time of a search; 0, which admits it, while nothing is known."""
        return self._means.get((kind, width), 0.0)

    def observe(self, kind: Hashable, width: int, seconds: float) -> None:
        """Learn from a finished search."""
        known = self._means.get((kind, width), seconds)
        self._means[kind, width] = known + _WEIGHT * (seconds - known)


class Admission:
    """The gate in front of inference. `waiting` and `running` count the searches on either side of it.

    What is behind it runs `concurrency` searches at a time and keeps the one at hand itself.
    """

    def __init__(
        self,
        concurrency: int,
        queue_limit: int,
        announce: Callable[[int, int], None] = lambda waiting, running: None,
    ) -> None:
        """announce: called with both counts whenever one of them changed."""
        self._concurrency, self._queue_limit, self._announce = concurrency, queue_limit, announce
        self._places = concurrency + _AT_HAND
        self._slots = asyncio.Semaphore(self._places)
        self._times = ServiceTimes()
        self.waiting = self.running = 0
        self._pressure, self._felt = 0.0, -math.inf

    @asynccontextmanager
    async def slot(self, kind: Hashable, width: int, limit: int, deadline: float) -> AsyncIterator[int]:
        """A slot to search in, with the width to use: at most `width`, not under `limit` because of the ladder.

        kind: searches of one kind take about the same time at one width. deadline: `time.monotonic()`. Raises
        Overloaded when the queue is full or the deadline cannot be met, DeadlineError when it passes meanwhile.
        """
        self.check(kind, width, limit, deadline)
        await self._enter(deadline)
        self._count(running=1)
        try:
            rungs, started = ladder(width, limit), time.monotonic()
            if self.waiting and self._times.estimate(kind, rungs[-1]) > deadline - started:
                raise DeadlineError("too little time was left after waiting")
            chosen = self._choose(kind, rungs, deadline - started)
            yield chosen
            self._times.observe(kind, chosen, time.monotonic() - started)
        finally:
            self._slots.release()
            self._count(running=-1)

    def check(self, kind: Hashable, width: int, limit: int, deadline: float) -> None:
        """Whether a search would be let in now; asked before any work is done for it. Raises like `slot`."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError("the deadline passed before the search could start")
        if not self._slots.locked():
            return
        fastest = self._times.estimate(kind, ladder(width, limit)[-1])
        wait = fastest * (self.waiting + 1) / self._places
        if self.waiting >= self._queue_limit:
            raise Overloaded(f"{self.waiting} searches are waiting already", math.ceil(wait))
        if _MARGIN * (wait + fastest) > left:
            raise Overloaded("too many searches are waiting for this deadline", math.ceil(wait))

    async def _enter(self, deadline: float) -> None:
        """Wait for a slot."""
        if not self._slots.locked():
            await self._slots.acquire()
            return
        self._count(waiting=1)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._slots.acquire()
        except TimeoutError:
            raise DeadlineError("the deadline passed while the search waited") from None
        finally:
            self._count(waiting=-1)

    def _count(self, waiting: int = 0, running: int = 0) -> None:
        self.waiting += waiting
        self.running += running
        self._announce(self.waiting, self.running)

    def _choose(self, kind: Hashable, rungs: tuple[int, ...], left: float) -> int:
        """The widest beam that the pressure allows and that fits into the time left; the narrowest if none does."""
        pressed = min(int(2 * self._press() / self._concurrency), len(rungs) - 1)
        fitting = (width for width in rungs[pressed:] if self._times.estimate(kind, width) <= left)
        return next(fitting, rungs[-1])

    def _press(self) -> float:
        """Searches that wait or are at hand now, or what has not faded of those before, if that is more."""
        now = time.monotonic()
        faded = self._pressure * math.exp((self._felt - now) / _MEMORY)
        self._pressure, self._felt = max(faded, self.waiting + max(0, self.running - self._concurrency)), now
        return self._pressure


def ladder(width: int, limit: int) -> tuple[int, ...]:
    """The widths a search may be given, widest first: halves of `width` that still fill a page of `limit`."""
    halves = (width >> rung for rung in range(1, _RUNGS))
    return (width, *(half for half in halves if half >= limit))
