"""What a window of the streaming update knows of the log, and which page views it learns from (spec §4.13)."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from onesearch.bundle import HeldOut
from onesearch.errors import ConfigError, DataError
from training.probe import GateConfig
from training.recipe import Recipe
from training.sessions import PageView, page_views
from training.stages import DpoStage, GrpoStage, TpmaStage
from training.tables import Tables

MIN_REPLAY = 0.3


@dataclass(frozen=True)
class StreamConfig:
    """How a bundle follows its log. window and delay are in the unit of the tables' times, seconds.

    window: length of a micro-batch. delay: how long after its page view an order is attributed. replay: share of old
    page views among those learned from. probe: held-out searches that the gate asks, at most. stages: what is trained
    in each window, in this order.
    """

    seed: int = 1
    threads: int = 1
    window: int = 86_400
    delay: int = 86_400
    replay: float = 0.5
    probe: int = 300
    stages: tuple[DpoStage | TpmaStage | GrpoStage, ...] = (
        DpoStage("prefer", steps=10, batch=256, lr=3e-5),
        TpmaStage("policy", steps=10, batch=64, lr=3e-5),
    )
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("delay", 0), ("probe", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: {getattr(self, name)}, expected at least {least}")
        if not MIN_REPLAY <= self.replay < 1:
            raise ConfigError(f"replay: {self.replay}, expected a share of at least {MIN_REPLAY} and below 1")
        for stage in self.stages:
            if isinstance(stage, DpoStage) and stage.source != "log":
                raise ConfigError(f"stages.{stage.name}.source: {stage.source!r}, expected 'log'")
        self.recipe(0)

    def recipe(self, window: int) -> Recipe:
        """The recipe of one window's training. Raises ConfigError for what every recipe must have."""
        return Recipe("stream", seed=self.seed + window, threads=self.threads, stages=self.stages)


@dataclass(frozen=True)
class Mix:
    """Positions of the page views to learn from: fresh ones, and old ones in the share that replay asks for."""

    fresh: frozenset[int]
    replayed: frozenset[int]


@dataclass(frozen=True)
class Log:
    """Page views in time order with all their outcomes; clicks: by session, without what was ordered unclicked."""

    views: Sequence[PageView]
    clicks: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, tables: Tables, probe: Sequence[HeldOut]) -> "Log":
        """The log of tables without the searches of the probe. Raises DataError when there is none."""
        held = {(request.context, request.clicked) for request in probe}
        views = [view for view in page_views(tables) if (view.context, view.clicked) not in held]
        if tables.recall is None or not views:
            raise DataError("recall", ["holds no page views, expected the log that the bundle is to follow"])
        clicks = tables.recall.select("session_id", "clicked_item_ids").iter_rows()
        return cls(views, {session: tuple(dict.fromkeys(items)) for session, items in clicks})

    def known(self, now: int, delay: int) -> list[PageView]:
        """Page views up to `now`; orders are part of one when the delay has passed since. Histories stay as they
        were at the time of the search."""
        return [
            view if view.time + delay <= now else replace(view, clicked=self.clicks[view.session_id], ordered=())
            for view in self.views
            if view.time <= now
        ]

    def begin(self, end: int, config: StreamConfig) -> int | None:
        """When the window begins in which something becomes known first: a page view after `end`, or an order.

        Windows follow `end` without gaps; those before it are passed over, as between the training of a bundle and its
        service. None when the log does not reach its end.
        """
        known = chain((view.time for view in self.views), (v.time + config.delay for v in self.views if v.ordered))
        news = min((time for time in known if time > end), default=None)
        if news is None:
            return None
        start = end + (news - end - 1) // config.window * config.window
        return start if start + config.window <= self.views[-1].time else None


def mix(known: Sequence[PageView], start: int, config: StreamConfig, live: Container[int], seed: int) -> Mix:
    """What a window that began at `start` learns from, of page views that clicked a live item.

    Fresh are those after `start` and those whose orders were attributed since. Old ones are drawn by seed; where there
    are too few of them, fresh ones are left out, so that the share holds.
    """
    useful = [i for i, view in enumerate(known) if any(item in live for item in view.clicked)]
    late = start - config.delay
    fresh = [i for i in useful if known[i].time > start or (known[i].ordered and known[i].time > late)]
    old = sorted(set(useful) - set(fresh))
    odds = config.replay / (1 - config.replay)
    rng = np.random.default_rng([seed, 13])
    fresh = _draw(fresh, len(fresh) if not odds else math.floor(len(old) / odds), rng)
    return Mix(frozenset(fresh), frozenset(_draw(old, math.ceil(odds * len(fresh)), rng)))


def _draw(rows: Sequence[int], most: int, rng: np.random.Generator) -> list[int]:
    return [rows[i] for i in rng.permutation(len(rows))[:most].tolist()]
