"""The composite reward, table-driven; every valid item has a relevance; interventions are timed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tiny_bundle import tiny_items

from onesearch.context import SearchContext
from onesearch.errors import DataError
from training.pars import Counts, calibrated
from training.rewards import Bonus, Relevance, Rewards, read_bonuses
from training.sessions import PageView
from training.stages import RewardConfig

# Items 1…5 are shoes, 6…10 bags (red, blue, green, black, white each); 1 and 2 share a SID.
SIDS = {i: np.asarray([i, 0, 0, 0, 0] if i != 2 else [1, 0, 0, 0, 0], np.uint16) for i in range(1, 11)}
VIEW = PageView(1, 1, 50, "train", "log", SearchContext("red shoes"), (1, 3, 4), (1, 3), (3,))
JUDGED = pl.DataFrame({"query": ["Red shoes"], "item_title": ["blue bag"], "score": [0]})
RATE = calibrated(100, 30, 5)[0]


def rewards(
    config: RewardConfig | None = None, bonuses: list[Bonus] | None = None, second: float = 0.5
) -> Rewards:
    """second: popularity of item 2, where the others have 1."""
    counts = Counts(dict.fromkeys(SIDS, 100), dict.fromkeys(SIDS, 30), dict.fromkeys(SIDS, 5))
    relevance = Relevance(tiny_items(), [VIEW], JUDGED)
    popularity = {i: 1.0 for i in SIDS} | {2: second}
    return Rewards(config or RewardConfig(), SIDS, popularity, counts, relevance, bonuses or [])


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (1, 3.0 + RATE + 3),  # clicked, same category, all words
        (3, 4.0 + RATE + 2),  # ordered, same category, another colour
        (4, 0.0 + RATE + 2),  # shown only
        (5, 0.0 + RATE + 2),  # unlogged items are graded too
        (6, 0.0 + RATE + 1),  # same department
        (7, 0.0 + RATE + 0),  # judged irrelevant: the table before the rule
    ],
)
def test_rewards_by_hand(item: int, expected: float) -> None:
    assert rewards().score(VIEW, SIDS[item][None]).tolist() == pytest.approx([expected])


def test_several_items_of_a_sid_are_rewarded_as_the_one_that_is_shown() -> None:
    made = rewards()
    assert made.item([1, 0, 0, 0, 0]) == rewards(second=1.0).item([1, 0, 0, 0, 0]) == 1  # by popularity, then id
    assert rewards(second=2.0).item([1, 0, 0, 0, 0]) == 2
    clicked_second = replace(VIEW, clicked=(2,), ordered=())
    assert made.score(clicked_second, SIDS[2][None]).tolist() == pytest.approx([RATE + 3])  # 1 is shown, not 2


def test_a_sid_without_an_item_gets_the_penalty_and_nothing_else() -> None:
    nowhere = np.asarray([[9, 9, 9, 9, 9]], np.uint16)
    assert rewards().item([9] * 5) is None
    assert rewards().score(VIEW, nowhere).tolist() == [0.0]
    assert rewards(RewardConfig(invalid=-1.0)).score(VIEW, nowhere).tolist() == [-1.0]


def test_the_adaptive_rate_is_clipped_to_one() -> None:
    made = rewards(RewardConfig(rate="adaptive"))
    for item in (1, 3, 5):
        outcome = 4.0 if item == 3 else 3.0 if item == 1 else 0.0
        grade = 3 if item == 1 else 2
        assert 0 <= made.score(VIEW, SIDS[item][None])[0] - outcome - grade <= 1


def test_an_intervention_adds_to_its_item_in_its_time(tmp_path: Path) -> None:
    path = tmp_path / "bonuses.jsonl"
    path.write_text(
        '{"item_id": 5, "bonus": 1.0, "start": 40, "end": 60}\n{"item_id": 6, "bonus": 1.0, "start": 60, "end": 70}\n'
    )
    made, plain = rewards(bonuses=read_bonuses(path)), rewards()
    codes = np.stack([SIDS[5], SIDS[6]])
    assert (made.score(VIEW, codes) - plain.score(VIEW, codes)).tolist() == pytest.approx([1.0, 0.0])
    later = replace(VIEW, time=60)
    assert (made.score(later, codes) - plain.score(later, codes)).tolist() == pytest.approx([0.0, 1.0])
    path.write_text('{"item_id": 5}\n')
    with pytest.raises(DataError, match="line 1"):
        read_bonuses(path)


def test_the_share_of_judged_rewards_is_known() -> None:
    codes = np.stack([SIDS[7], SIDS[1], np.full(5, 9, np.uint16)])
    assert rewards().judged_share(VIEW, codes) == 0.5
