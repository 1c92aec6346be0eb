"""Readiness: every engine replays its golden examples, in the background, before it counts as ready.

An engine whose model is on a server is asked again all the time: servers go away, come back and change.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Literal, TypedDict

from service.deployment import Engine

_MAX_REASONS = 5
_PERIOD_SECONDS = 1.0
logger = logging.getLogger("onesearch.readiness")


class EngineState(TypedDict):
    """What `/readyz` says of one engine."""

    state: Literal["starting", "ready", "failed"]
    reasons: list[str]


class Readiness:
    """The outcome of the checks so far, by engine name. draining: the process is about to stop and takes no more."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines
        self.draining = False
        starting: EngineState = {"state": "starting", "reasons": ["golden examples are being replayed"]}
        self.states: dict[str, EngineState] = {engine.name: starting for engine in engines}

    @property
    def ready(self) -> bool:
        """Whether every engine is ready and the process is not about to stop."""
        return not self.draining and all(state["state"] == "ready" for state in self.states.values())

    async def check(self) -> None:
        """Check the engines one after the other, and those on a server again and again."""
        for engine in self._engines:
            await self._check(engine)
        while watched := [engine for engine in self._engines if engine.watched]:
            await asyncio.sleep(_PERIOD_SECONDS)
            for engine in watched:
                await self._check(engine)

    async def _check(self, engine: Engine) -> None:
        try:
            reasons = await asyncio.to_thread(engine.check)
        except Exception as error:  # whatever a broken model does, the service must live to report it
            reasons = [f"replay failed: {type(error).__name__}: {error}"]
        if len(reasons) > _MAX_REASONS:
            reasons = [*reasons[:_MAX_REASONS], f"and {len(reasons) - _MAX_REASONS} more"]
        checked: EngineState = {"state": "failed" if reasons else "ready", "reasons": reasons}
        if checked != self.states[engine.name]:
            self.states[engine.name] = checked
            logger.info("checked", extra={"fields": {"engine": engine.name, "reasons": reasons}})
