"""The composite item reward of rollouts: R = R_C&O + R_CTR + R_Rel (spec §4.11).

Works on codes, never on text: a rollout is looked up as the tuple of its codes. Where several items share a SID, the
reward is that of the item that would be shown first.

Legend: N rollouts, L SID levels.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl

from onesearch.errors import DataError
from onesearch.sid import Codes
from onesearch.text import normalise, words
from training.pars import Counts, adaptive_reward
from training.sessions import PageView
from training.stages import RewardConfig


@dataclass(frozen=True)
class Bonus:
    """An amount added to R_Rel of an item for page views with `start` <= time < `end` (spec §4.11, intervention)."""

    item_id: int
    bonus: float
    start: int
    end: int


def read_bonuses(path: Path) -> list[Bonus]:
    """JSONL of item_id, bonus, start, end (times as in the tables). Raises DataError naming file and line."""
    rows: list[Bonus] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = Bonus(**orjson.loads(line))
        except (orjson.JSONDecodeError, TypeError) as error:
            fault = f"line {number}: {error}, expected item_id, bonus, start, end"
            raise DataError(path.name, [fault]) from error
        rows.append(row)
    return rows


class Relevance:
    """R_Rel of any (query, item): 3 excellent, 2 related, 1 mismatch, 0 irrelevant.

    Judged pairs are looked up by query and title. Every other item gets a rule, so that no item is punished for
    never having been logged: by the category that clicks on the query mean, 2 for the same, 1 for the same
    department, else 0; and 3 for the same category when the title holds every query word that titles of that
    category use at all.
    """

    def __init__(self, items: pl.DataFrame, views: Sequence[PageView], judged: pl.DataFrame | None) -> None:
        names = items.select("item_id", "item_title", "category_level1_name", "category_level2_name").iter_rows()
        self._titles: dict[int, str] = {}
        self._paths: dict[int, tuple[str, str]] = {}
        self._vocabulary: dict[str, set[str]] = defaultdict(set)
        for item, title, department, category in names:
            self._titles[item], self._paths[item] = title, (department, category)
            self._vocabulary[category].update(words(normalise(title)))
        clicks: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        for view in views:
            clicks[view.context.query].update(self._paths[i] for i in view.clicked if i in self._paths)
        self._meant = {q: min(c, key=lambda path: (-c[path], path)) for q, c in clicks.items() if c}
        rows = [] if judged is None else judged.select("query", "item_title", "score").iter_rows()
        self._judged = {(normalise(query), title): int(score) for query, title, score in rows}

    def grade(self, query: str, item: int) -> tuple[int, bool]:
        """The grade, and whether it was judged."""
        judged = self._judged.get((query, self._titles[item]))
        if judged is not None:
            return judged, True
        if query not in self._meant:
            return 0, False
        (department, category), meant = self._paths[item], self._meant[query]
        if category != meant[1]:
            return int(department == meant[0]), False
        wanted = set(words(query)) & self._vocabulary[category]
        return (3 if wanted <= set(words(normalise(self._titles[item]))) else 2), False


class Rewards:
    """Composite rewards over one catalog. popularity: item → what orders items within a SID, as in serving."""

    def __init__(
        self,
        config: RewardConfig,
        item_sids: Mapping[int, Codes],
        popularity: Mapping[int, float],
        counts: Counts,
        relevance: Relevance,
        bonuses: Sequence[Bonus] = (),
    ) -> None:
        self._config, self._counts, self.relevance = config, counts, relevance
        self._bonuses: dict[int, list[Bonus]] = defaultdict(list)
        for bonus in bonuses:
            self._bonuses[bonus.item_id].append(bonus)
        self._shown: dict[tuple[int, ...], int] = {}
        for item in sorted(item_sids, key=lambda i: (-popularity.get(i, 0.0), i)):
            self._shown.setdefault(tuple(item_sids[item].tolist()), item)

    def item(self, codes: Sequence[int]) -> int | None:
        """The item shown first for a SID; None when no live item has it."""
        return self._shown.get(tuple(codes))

    def score(self, view: PageView, codes: Codes) -> npt.NDArray[np.float64]:
        """R of rollouts codes [N, L] for one page view, float64 [N]."""
        return np.asarray([self._one(view, tuple(row)) for row in codes.tolist()])

    def judged_share(self, view: PageView, codes: Codes) -> float:
        """Share of valid rollouts whose relevance was judged, not ruled: the coverage of the reward."""
        items = [item for row in codes.tolist() if (item := self.item(row)) is not None]
        return sum(self.relevance.grade(view.context.query, i)[1] for i in items) / max(1, len(items))

    def _one(self, view: PageView, codes: tuple[int, ...]) -> float:
        item = self.item(codes)
        if item is None:
            return self._config.invalid
        outcome = (
            self._config.order if item in view.ordered else self._config.click if item in view.clicked else 0.0
        )
        active = (
            (b.bonus for b in self._bonuses[item] if b.start <= view.time < b.end) if item in self._bonuses else ()
        )
        return outcome + self._rate(view, item) + self.relevance.grade(view.context.query, item)[0] + sum(active)

    def _rate(self, view: PageView, item: int) -> float:
        ctr, cvr = self._counts.rates(item)
        if self._config.rate == "ctr":
            return min(max(ctr, 0.0), 1.0)
        level = 1 if item in view.ordered else 3 if item in view.clicked else 4 if item in view.impressed else 6
        return min(max(adaptive_reward(level, ctr, cvr), 0.0), 1.0)
