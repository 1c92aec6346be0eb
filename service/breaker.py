"""The circuit breaker of the store: when it fails or is slow, requests do without it instead of waiting for it.

closed: calls go through, each for a bounded time. open: calls fail at once. half-open: the breaker itself asks the
store whether it is back; no request is spent on finding out. Recovery needs no restart.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from service.state import StateUnavailable

T = TypeVar("T")
BreakerState = Literal["closed", "half_open", "open"]

FAILURES_IN_A_ROW = 3
RECENT_CALLS = 20  # open, too, when half of so many calls failed
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 4.0  # seconds between probes; the pause doubles while the store keeps failing
STEADY_SECONDS = 10.0  # closed for so long, the store counts as well and the next pause is short again
logger = logging.getLogger("onesearch.store")


class Breaker:
    """Guards calls of one store. Used on the event loop only."""

    def __init__(
        self, ping: Callable[[], Awaitable[None]], timeout: float, told: Callable[[BreakerState], None]
    ) -> None:
        """timeout bounds probes and calls, in seconds; `told` hears every change of state."""
        self._ping = ping
        self._timeout = timeout
        self._told = told
        self._recent: deque[bool] = deque(maxlen=RECENT_CALLS)
        self._pause = FIRST_PAUSE
        self._closed_at = time.monotonic()
        self._probing: asyncio.Task[None] | None = None
        self.state: BreakerState = "closed"

    async def call(self, work: Callable[[], Awaitable[T]], timeout: float | None = None) -> T:
        """What the store answers. Raises StateUnavailable: at once while open, else after the timeout at most.

        timeout: seconds, for work that may take longer than other calls.
        """
        if self.state != "closed":
            raise StateUnavailable("store: is away")
        try:
            answer = await self._in_time(work, timeout or self._timeout)
        except StateUnavailable:
            self._count(False)
            raise
        self._count(True)
        return answer

    async def close(self) -> None:
        """Stop probing."""
        if self._probing is not None:
            self._probing.cancel()

    async def _in_time(self, work: Callable[[], Awaitable[T]], timeout: float) -> T:
        try:
            async with asyncio.timeout(timeout):
                return await work()
        except TimeoutError as error:
            raise StateUnavailable(f"store: took longer than {timeout} s") from error

    def _count(self, good: bool) -> None:
        if self.state != "closed":  # a call that began before the breaker opened
            return
        self._recent.append(good)
        recent = list(self._recent)
        in_a_row = len(recent) >= FAILURES_IN_A_ROW and not any(recent[-FAILURES_IN_A_ROW:])
        if in_a_row or recent.count(False) * 2 >= RECENT_CALLS:
            self._open()

    def _open(self) -> None:
        steady = time.monotonic() - self._closed_at > STEADY_SECONDS
        self._pause = FIRST_PAUSE if steady else self._pause
        self._enter("open")
        self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        while self.state != "closed":
            await asyncio.sleep(self._pause)
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
            self._enter("half_open")
            try:
                await self._in_time(self._ping, self._timeout)
            except StateUnavailable:
                self._enter("open")
            else:
                self._recent.clear()
                self._closed_at = time.monotonic()
                self._enter("closed")

    def _enter(self, state: BreakerState) -> None:
        if state != "half_open" and (self.state, state) != ("half_open", "open"):
            logger.warning("breaker", extra={"fields": {"state": state}})
        self.state = state
        self._told(state)
