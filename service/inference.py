"""The inference seam: one method that turns a context into ranked rows, without blocking the event loop."""

import asyncio
import os
import sys
import threading
from collections.abc import Sequence
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
    """Searches in this process, on threads that runners may share; what they have no time for waits its turn."""

    def __init__(self, searcher: Searcher, threads: ThreadPoolExecutor) -> None:
        self._searcher, self._threads = searcher, threads

    async def search(self, context: SearchContext, options: SearchOptions) -> SearchResult:
        """See `InferenceRunner.search`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._searcher.search, context, options)

    async def close(self) -> None:
        """See `InferenceRunner.close`. Ends the threads."""
        await asyncio.to_thread(self._threads.shutdown)


def search_threads(count: int, cores: Sequence[int] = ()) -> ThreadPoolExecutor:
    """Threads to search on, of a lower priority than the event loop: a search on every core does not delay it.

    cores, if given, are those that the threads keep to, one each. Left to themselves two of them wake up on one core
    every now and then, and there they stay for a while although the other core is idle.

    Where threads have no priority and no core of their own (other than on Linux) nothing changes.
    """
    left = iter(cores)

    def settle() -> None:
        if sys.platform == "linux":
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _YIELD))
            if (core := next(left, None)) is not None:
                os.sched_setaffinity(thread, {core})

    return ThreadPoolExecutor(count, "search", settle)


def own_cores(count: int) -> Sequence[int]:
    """The cores this process may use if they are as many as `count`, else none: then searches do not fill them."""
    cores = tuple(sorted(os.sched_getaffinity(0))) if sys.platform == "linux" else ()
    return cores if len(cores) == count else ()
