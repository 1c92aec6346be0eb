"""Writes that no request waits for: exposures and keyword jobs, kept for a moment and written in batches.

Bounded: while the store is away the oldest are let go, and counted. The death of the process loses at most the last
FLUSH_SECONDS of exposures. After a failed write a batch is written again, so one exposure may stand in the log twice.
"""

import time
from collections import deque
from functools import partial

from service.breaker import Breaker
from service.events import Exposure
from service.keywords import Job
from service.state import StateUnavailable
from service.store import Store
from service.telemetry import Metrics

FLUSH_SECONDS = 0.25
MAX_WAITING = 10_000
_BATCH = 100


class Outbox:
    """Waiting writes of one process. Used on the event loop only."""

    def __init__(self, store: Store, breaker: Breaker, metrics: Metrics, timeout: float) -> None:
        """timeout bounds every write, in seconds."""
        self._timeout = timeout
        self._store = store
        self._breaker = breaker
        self._metrics = metrics
        self._exposures: deque[Exposure] = deque()
        self._jobs: deque[Job] = deque()

    def expose(self, exposure: Exposure) -> None:
        """Log an exposure soon."""
        self._exposures.append(exposure)
        if len(self._exposures) > MAX_WAITING:
            self._exposures.popleft()
            self._metrics.dropped("exposure")

    def enqueue(self, job: Job) -> None:
        """Ask for keywords soon."""
        self._jobs.append(job)
        if len(self._jobs) > MAX_WAITING:
            self._jobs.popleft()
            self._metrics.dropped("job")

    async def flush(self) -> None:
        """Write what waits, as far as the store lets it."""
        try:
            while self._exposures:
                exposures = [self._exposures[i] for i in range(min(_BATCH, len(self._exposures)))]
                await self._breaker.call(partial(self._store.events.expose, exposures), self._timeout)
                for _ in exposures:
                    self._exposures.popleft()
            while self._jobs:
                jobs = [self._jobs.popleft() for _ in range(min(_BATCH, len(self._jobs)))]
                await self._breaker.call(partial(self._store.keywords.enqueue, jobs, time.time()), self._timeout)
        except StateUnavailable:
            return  # exposures stay for the next time; keywords that are still missing will be asked for again
