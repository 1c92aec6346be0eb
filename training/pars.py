"""PARS, the preference system of OneSearch-V1 (spec §4.9): levels of feedback, calibrated rates, adaptive rewards,
and from them the listwise preferences that DPO learns.

Legend: n negatives.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from training.sessions import PageView

# 1 ordered here · 2 ordered elsewhere, same category as a click here · 3 clicked · 4 shown only · 5 same category, not
# shown · 6 another category. The logs have no recommendation feed, so level 2 reads the user's earlier orders.
LEVEL_WEIGHTS = (2.0, 1.5, 1.0, 0.5, 0.2, 0.0)
POSITIVE_LEVELS = (1, 2, 3)
_SMOOTHING = 10


@dataclass(frozen=True)
class Counts:
    """Exposures, clicks and orders per item over some page views."""

    shown: Mapping[int, int] = field(default_factory=dict)
    clicked: Mapping[int, int] = field(default_factory=dict)
    ordered: Mapping[int, int] = field(default_factory=dict)

    def rates(self, item: int) -> tuple[float, float]:
        """Calibrated (Ctr, Cvr), also for an item that was never shown."""
        return calibrated(self.shown.get(item, 0), self.clicked.get(item, 0), self.ordered.get(item, 0))


def count(views: Sequence[PageView]) -> Counts:
    """Counts of page views; an item counts once a page view."""
    shown: Counter[int] = Counter()
    clicked: Counter[int] = Counter()
    ordered: Counter[int] = Counter()
    for view in views:
        shown.update(set(view.impressed) | set(view.clicked))
        clicked.update(set(view.clicked))
        ordered.update(set(view.ordered))
    return Counts(shown, clicked, ordered)


def calibrated(shown: int, clicked: int, ordered: int) -> tuple[float, float]:
    """Ctr = log(clk+10) / log[(pos+10)(clk+10)(ord+10)] and Cvr = log(ord+10) / log(clk+10)."""
    logs = [math.log(n + _SMOOTHING) for n in (shown, clicked, ordered)]
    return logs[1] / sum(logs), logs[2] / logs[1]


def adaptive_reward(level: int, ctr: float, cvr: float) -> float:
    """r(q,i) = 2λ Ctr Cvr / (Ctr + Cvr), λ by level 1…6."""
    return 2 * LEVEL_WEIGHTS[level - 1] * ctr * cvr / (ctr + cvr)


def gap_weight(better: float, worse: float, exponent: float = 1.0, least: float = 0.1, cap: float = 4.0) -> float:
    """1 + min(max(r_w − r_l, least)^−a, cap): close pairs weigh more; finite for every input (spec §4.10)."""
    return 1.0 + min(math.pow(max(better - worse, least), -exponent), cap)


@dataclass(frozen=True)
class Preference:
    """One positive of a page view against n items of lower levels: items, rewards and levels, the positive first."""

    view: int
    items: tuple[int, ...]
    rewards: tuple[float, ...]
    levels: tuple[int, ...] = ()


def preferences(
    views: Sequence[PageView],
    categories: Mapping[int, str],
    same: Callable[[int, int], bool],
    negatives: int,
    seed: int,
    learn: Container[int] | None = None,
) -> list[Preference]:
    """Levels 1–3 of each page view against `negatives` draws of levels 4–6, in equal shares while they last.

    categories: item → category, for every item that may be drawn. same(a, b): the items share a SID. A negative is
    never an item that the page view clicked, nor one that shares a positive's SID (spec §4.10). learn: positions of
    the page views that get preferences, None for all; rates and earlier orders are of all.
    """
    counts = count(views)
    by_category: dict[str, list[int]] = defaultdict(list)
    for item, category in categories.items():
        by_category[category].append(item)
    everything = list(categories)
    rng = np.random.default_rng([seed, 6])
    bought: dict[int, list[int]] = defaultdict(list)
    found: list[Preference] = []
    for number, view in enumerate(views):
        wanted = learn is None or number in learn
        levels = _positives(view, categories, bought[view.user_id]) if wanted else {}
        for item, level in levels.items():
            pools = (
                (4, [i for i in view.impressed if i in categories]),
                (5, by_category[categories[item]]),
                (6, everything),
            )
            losers = _draw(
                pools, {*levels, *view.clicked}, item, same, categories, set(view.impressed), negatives, rng
            )
            if losers:
                ranked = {item: level} | losers
                rewards = tuple(adaptive_reward(low, *counts.rates(i)) for i, low in ranked.items())
                found.append(Preference(number, tuple(ranked), rewards, tuple(ranked.values())))
        if view.user_id:
            bought[view.user_id] += [i for i in view.ordered if i in categories]
    return found


def _positives(view: PageView, categories: Mapping[int, str], bought: Sequence[int]) -> dict[int, int]:
    """Item → level 1, 2 or 3; `bought` are the user's earlier orders."""
    clicked = [i for i in view.clicked if i in categories]
    levels = {i: 1 if i in view.ordered else 3 for i in clicked}
    wanted = {categories[i] for i in clicked}
    return levels | {i: 2 for i in dict.fromkeys(bought) if i not in levels and categories[i] in wanted}


def _draw(
    pools: Sequence[tuple[int, Sequence[int]]],
    taken: set[int],
    positive: int,
    same: Callable[[int, int], bool],
    categories: Mapping[int, str],
    shown: set[int],
    wanted: int,
    rng: np.random.Generator,
) -> dict[int, int]:
    """Item → level 4, 5 or 6, at most `wanted`; a few draws per pool, so that a large pool costs nothing."""
    drawn: dict[int, int] = {}
    for number, (level, pool) in enumerate(pools):
        share = (wanted - len(drawn)) // (len(pools) - number)
        for place in rng.integers(0, max(1, len(pool)), 4 * share if pool else 0).tolist():
            item, kept = pool[place], sum(low == level for low in drawn.values())
            foreign = level == 6 and categories[item] == categories[positive]
            if kept >= share or item in taken or item in drawn or foreign or (level > 4 and item in shown):
                continue
            if not same(item, positive):
                drawn[item] = level
    return drawn
