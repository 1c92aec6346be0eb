"""The inference seam: one method that turns a context into ranked rows, without blocking the event loop."""

import asyncio
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from onesearch.context import SearchContext
from onesearch.search import Searcher, SearchOptions, SearchResult

_YIELD = 5  # steps of niceness


class InferenceRunner(Protocol):
    """Answers searches over one bundle."""

    async def search(self, context: SearchContext, options: SearchOptions) -> SearchResult:
        """The best items for a context. Raises DecodeError if the model fails."""
        ...

    async def close(self) -> None:
        """Finish running searches and release the runner."""
        ...


class EmbeddedRunner:
    """Searches in this process; at most `concurrency` searches run at the same time, the others wait their turn."""

    def __init__(self, searcher: Searcher, concurrency: int) -> None:
        self._searcher = searcher
        self._pool = ThreadPoolExecutor(concurrency, "search", _yield_to_the_loop)

    async def search(self, context: SearchContext, options: SearchOptions) -> SearchResult:
        """See `InferenceRunner.search`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._searcher.search, context, options)

    async def close(self) -> None:
        """See `InferenceRunner.close`."""
        await asyncio.to_thread(self._pool.shutdown)


def _yield_to_the_loop() -> None:
    """Lower the priority of the calling thread, so that a search on every core does not delay the event loop.

    Where threads have no priority of their own (other than on Linux) nothing changes.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _YIELD))
