"""Changes of items while serving: accepted into the journal, visible in every bundle's next search, compacted.

Every process that serves the same bundles shares the journal. Before a search it asks, in microseconds, whether
another process has written, and catches up if so; hence a change is in the next search of every worker.
"""

import asyncio
import fcntl
import logging
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from onesearch.catalog import Item
from onesearch.errors import BundleError
from onesearch.versions import list_versions, open_version, remove_versions
from service.deployment import Engine
from service.journal import JOURNAL, Journal, JournalUnavailable
from service.telemetry import Metrics

T = TypeVar("T")
logger = logging.getLogger("onesearch.items")


class Items:
    """The items of all engines, changing together. Work runs on threads of its own, never on the event loop."""

    def __init__(self, engines: Sequence[Engine], folder: Path, compact_after: int, metrics: Metrics) -> None:
        """Bring the engines to where the journal in `folder` ends. Raises ConfigError when it is not usable."""
        self._engines, self._compact_after, self._metrics = engines, compact_after, metrics
        self._journal = Journal(folder / JOURNAL)
        self._versions = folder / "versions"
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="items")
        self._compactor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compaction")
        self._compacting: Future[None] | None = None
        self._stamp = self._journal.stamp()
        for engine in engines:
            self._adopt_newest(engine)
        self._follow()

    async def change(self, changes: Sequence[tuple[int, Item | None]]) -> list[bool]:
        """Accept new items, or removals (None); durable and visible on return. Whether each id was live before.

        Raises JournalUnavailable, and then nothing was accepted.
        """

        def work() -> list[bool]:
            self._follow()
            known = [self.live(item_id) for item_id, _ in changes]
            kept = [change for change, live in zip(changes, known, strict=True) if live or change[1]]
            if kept:
                self._journal.append(kept)
                self._follow()
            self._metrics.items_changed("put", sum(1 for _, item in kept if item))
            self._metrics.items_changed("remove", sum(1 for _, item in kept if not item))
            return known

        return await self._run(work)

    async def roll_back(self) -> None:
        """Go back to the previous version, visible on return. Raises NothingToRollBack and JournalUnavailable."""

        def work() -> None:
            point = self._journal.roll_back()
            self._follow()
            self._metrics.rolled_back()
            logger.warning("rolled back", extra={"fields": {"to": point}})

        await self._run(work)

    async def catch_up(self) -> None:
        """Make visible what other processes have accepted. A journal that cannot be read holds up no search."""
        try:
            stamp = self._journal.stamp()
            if stamp != self._stamp:
                await self._run(self._follow)
                self._stamp = stamp
        except JournalUnavailable as error:
            logger.error("not up to date", extra={"fields": {"error": str(error)}})

    def live(self, item_id: int) -> bool:
        """Whether any engine has an item."""
        return any(engine.live.snapshot.row_of(item_id) is not None for engine in self._engines)

    async def compact(self) -> None:
        """Compact now, however little there is."""
        await asyncio.get_running_loop().run_in_executor(self._compactor, self._compact, 1)

    async def close(self) -> None:
        """Finish what runs and close the journal."""
        await asyncio.to_thread(self._writer.shutdown)
        await asyncio.to_thread(self._compactor.shutdown)
        self._journal.close()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)

    def _follow(self) -> None:
        changes = self._journal.since(min(engine.live.snapshot.seq for engine in self._engines))
        for engine in self._engines:
            engine.live.apply(changes)
            self._metrics.catalog(engine.name, engine.live.snapshot.num_items, engine.live.snapshot.seq)
        if self._behind(self._compact_after) and (self._compacting is None or self._compacting.done()):
            self._compacting = self._compactor.submit(self._compact, self._compact_after)

    def _behind(self, changes: int) -> bool:
        return any(engine.live.pending >= changes for engine in self._engines)

    def _compact(self, least: int) -> None:
        """Compact every engine with at least so many changes.

        Of several processes one does the work; the others wait for it and go on from its version.
        """
        try:
            self._versions.mkdir(exist_ok=True)
            with (self._versions / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                for engine in self._engines:
                    self._adopt_newest(engine)
                if not self._behind(least):
                    return
                for engine in self._engines:
                    engine.live.compact(self._folder(engine))
                    remove_versions(self._folder(engine), keep=engine.live.snapshot.base.seq)
            self._journal.seal(min(engine.live.snapshot.base.seq for engine in self._engines))
            self._metrics.compacted()
        except Exception:  # a full disk must not end the service: the changes are in the journal and in memory
            logger.exception("compaction failed")

    def _adopt_newest(self, engine: Engine) -> None:
        folder = self._folder(engine)
        found, head = list_versions(folder), self._journal.head()
        for seq in reversed(found):
            if engine.live.snapshot.base.seq >= seq:
                return
            try:
                if seq <= head:
                    return engine.live.adopt(open_version(folder / str(seq)))
            except BundleError as error:  # it can be made again from the journal
                logger.warning("version dropped", extra={"fields": {"faults": error.faults}})
            shutil.rmtree(folder / str(seq), ignore_errors=True)

    def _folder(self, engine: Engine) -> Path:
        return self._versions / f"{self._journal.id}-{engine.identifiers}"
