"""The study: rows are complete recipes, what is done is skipped, and the report's figures equal their definition."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import orjson
import pytest

from benchmarks import study
from benchmarks.study_report import Outcome, estimates, verdict, write_report
from training.metrics import paired

# Three page views: two clicked items in the first, one in each other; the last is a tail query and was ordered.
VIEW = np.array([0, 0, 1, 2])
MASKS = {
    "clicks": np.ones(4, dtype=bool),
    "orders": np.array([False, False, False, True]),
    "head queries": np.array([True, True, True, False]),
    "tail queries": np.array([False, False, False, True]),
}


def outcome(*ranks: int) -> Outcome:
    return Outcome(np.array(ranks), VIEW, MASKS)


def test_values_are_means_over_the_clicked_items_of_a_page_view() -> None:
    found = outcome(1, 0, 4, 2)
    assert found.values("clicks HR@10").tolist() == [0.5, 1.0, 1.0]
    assert found.values("clicks MRR@10").tolist() == [0.5, 0.25, 0.5]
    assert found.values("orders HR@10").tolist() == [1.0]
    assert found.values("head HR@10").tolist() == [0.5, 1.0]
    assert found.values("tail HR@10").tolist() == [1.0]


def test_differences_are_paired_by_seed_and_only_shared_seeds_count() -> None:
    outcomes = {
        "v1": {1: outcome(0, 0, 0, 0), 2: outcome(1, 1, 0, 0)},
        "cot": {1: outcome(1, 1, 0, 0), 2: outcome(1, 1, 1, 0), 3: outcome(1, 1, 1, 1)},
    }
    found = estimates(outcomes, "v1")["cot"]["clicks HR@10"]
    assert found["seeds"] == 3
    assert found["mean"] == pytest.approx((1 / 3 + 2 / 3 + 1) / 3)
    assert found["difference"]["value"] == pytest.approx((1 / 3 + 1 / 3) / 2)
    assert "difference" not in estimates(outcomes, "v1")["v1"]["clicks HR@10"]


def test_the_interval_covers_the_truth_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(120):
        seeds = rng.normal(0, 0.02, (8, 1))  # training noise, shared by all page views of a seed
        gaps = 0.05 + seeds + rng.normal(0, 0.4, (8, 300))
        found = paired(gaps, trial, resamples=300)
        covered += found.low is not None and found.high is not None and found.low < 0.05 < found.high
    assert covered / 120 > 0.85


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.1, 0.2, "effect"), (-0.2, -0.1, "harm"), (-0.1, 0.1, "no effect found")]
)
def test_verdicts(low: float, high: float, word: str) -> None:
    assert verdict({"low": low, "high": high}) == word


def test_the_report_is_written_whole_and_names_what_was_not_run(tmp_path) -> None:
    rows = {n: SimpleNamespace(label=n.upper(), tables=("3",)) for n in ("v1", "cot", "never")}
    runs = {
        (n, 1): {"train_seconds": 2.0, "hardware": "cpu", "torch": "t", "date": "2026-01-01T00:00:00"}
        for n in ("v1", "cot")
    }
    outcomes = {"v1": {1: outcome(0, 0, 0, 0)}, "cot": {1: outcome(1, 1, 1, 1)}}
    write_report(tmp_path, "s", rows, runs, outcomes, {"steps": 3})
    document = orjson.loads((tmp_path / "s.json").read_bytes())
    assert document["not run"] == ["never"]
    assert [row["row"] for row in document["rows"]] == ["v1", "cot"]
    text = (tmp_path / "s.md").read_text()
    assert text.startswith("# S study") and "`python -m benchmarks.study --study s`" in text
    assert "| COT | 1 | 2 |" in text and "effect" in text
    assert (tmp_path / "s.png").stat().st_size > 1000


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_committed_run_belongs_to_a_row_as_it_is_now(name: str) -> None:
    """Otherwise the report would lose it without a word, say for a key that recipes gained."""
    folder = Path(study.__file__).parent / "studies" / f"{name}.runs"
    runs = sorted(tuple(path.stem.rsplit("-", 1)) for path in folder.glob("*.json"))
    assert sorted((row, str(seed)) for row, seed in study.known_runs(folder, study.STUDIES[name]())) == runs != []


def test_every_row_is_a_recipe_and_changed_rows_are_run_again(tmp_path) -> None:
    everything = study.ablation()
    assert {"v1", "cot", "rag", "sdft", "pars", "grpo", "tpma", "v2"} <= everything.keys()
    for row in (*everything.values(), *study.history().values()):
        study.recipe_of(row, 1)
    row = everything["v1"]
    line = {"row": "v1", "seed": 1, "fingerprint": study.fingerprint(row)}
    (tmp_path / "v1-1.json").write_bytes(orjson.dumps(line))
    (tmp_path / "v1-2.json").write_bytes(orjson.dumps(line | {"seed": 2, "fingerprint": "old"}))
    known = study.known_runs(tmp_path, everything)
    assert set(known) == {("v1", 1)}
    with study.claimed(tmp_path / "seed-2.lock") as first, study.claimed(tmp_path / "seed-2.lock") as second:
        assert (first, second) == (True, False)
    with study.claimed(tmp_path / "seed-2.lock") as again:
        assert again
