"""Follows the experiments file while the service runs: ramps, kill switches and new arms need no restart."""

import asyncio
import logging
from pathlib import Path

from onesearch.errors import ConfigError
from service.deployment import Deployment
from service.telemetry import Metrics
from service.variants import read_split

POLL_SECONDS = 1.0
logger = logging.getLogger("onesearch.experiments")


async def watch_experiments(path: Path | None, deployment: Deployment, metrics: Metrics) -> None:
    """Adopt the file whenever it changes. A file that is wrong or gone is logged, and the last good one stays."""
    if path is None:
        return
    seen = _stamp(path)
    while True:
        await asyncio.sleep(POLL_SECONDS)
        stamp = _stamp(path)
        if stamp == seen:
            continue
        seen = stamp
        try:
            deployment.adopt(read_split(path, [engine.name for engine in deployment.engines]))
        except ConfigError as error:
            metrics.experiments_reload("refused")
            logger.error("experiments refused", extra={"fields": {"faults": str(error)}})
            continue
        metrics.experiments_reload("adopted")
        for variant in deployment.variants.values():
            metrics.variant(variant.name, variant.engine.model_version, variant.engine.live.snapshot.version)
        logger.info("experiments adopted", extra={"fields": {"variants": list(deployment.variants)}})


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when the file does: its time and its number, None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
