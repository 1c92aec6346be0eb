"""Two recipes over seeds: pairs by seed and page view, values by hand, and nothing that does not pair."""

import math
from pathlib import Path

import orjson
import pytest
from command_line import invoke

from onesearch.errors import DataError
from training import compare
from training.compare import compare_runs, read_run

SESSIONS = (5, 5, 9, 7)


def report(folder: Path, name: str, seed: int, ranks: list[int], sessions: tuple[int, ...] = SESSIONS) -> Path:
    """Page view 5 has two clicked items; that of page view 7 was ordered."""
    path = folder / f"{name}.json"
    slices = {"clicks": [0, 1, 2, 3], "orders": [3], "empty": []}
    units = {"session": list(sessions), "rank": ranks, "slices": slices}
    path.write_bytes(orjson.dumps({"run": {"recipe_seed": seed}, "measures": [], "units": units}))
    return path


def test_differences_are_paired_by_seed_whatever_the_order_of_the_reports(tmp_path: Path) -> None:
    ours = [read_run(report(tmp_path, f"a{s}", s, r)) for s, r in ((1, [1, 0, 2, 11]), (2, [1, 1, 1, 1]))]
    theirs = [read_run(report(tmp_path, f"b{s}", s, r)) for s, r in ((2, [1, 0, 1, 0]), (1, [0, 0, 2, 1]))]
    found = compare_runs(ours, theirs)
    assert found.keys() == {(s, m) for s in ("clicks", "orders") for m in ("HR@10", "MRR@10")}
    mean, gap = found["clicks", "HR@10"]
    # by page view 5, 7, 9: seed 1 (1/2, 0, 1) and (0, 1, 1); seed 2 (1, 1, 1) and (1/2, 0, 1)
    assert mean == pytest.approx((0.5 + 0 + 1 + 3) / 6)
    assert gap.value == pytest.approx(((0.5 - 1 + 0) + (0.5 + 1 + 0)) / 6)
    assert gap.low is not None and gap.high is not None and gap.low < gap.value < gap.high
    assert found["orders", "MRR@10"][1].value == pytest.approx((-1 + 1) / 2)


def test_equal_runs_differ_by_nothing(tmp_path: Path) -> None:
    runs = [read_run(report(tmp_path, "a", 1, [1, 2, 3, 0]))]
    assert all((gap.value, gap.low, gap.high) == (0, 0, 0) for _, gap in compare_runs(runs, runs).values())


def test_what_does_not_pair_is_refused(tmp_path: Path) -> None:
    one, two = (read_run(report(tmp_path, f"a{s}", s, [1, 1, 1, 1])) for s in (1, 2))
    with pytest.raises(DataError, match=r"seeds \[1\] against \[2\]"):
        compare_runs([one], [two])
    with pytest.raises(DataError, match="two reports of seed 1"):
        compare_runs([one, one], [one])
    other = read_run(report(tmp_path, "b", 1, [1, 1, 1, 1], sessions=(5, 5, 9, 8)))
    with pytest.raises(DataError, match="different page views"):
        compare_runs([one], [other])
    (tmp_path / "c.json").write_bytes(b"{}")
    with pytest.raises(DataError, match="is no report on logs"):
        read_run(tmp_path / "c.json")


def test_the_command_prints_each_measure_and_says_what_one_seed_is_worth(tmp_path: Path) -> None:
    ours, theirs = report(tmp_path, "a", 1, [1, 1, 1, 1]), report(tmp_path, "b", 1, [0, 0, 0, 0])
    shown = invoke(compare.main, ours, "--against", theirs)
    assert shown.exit_code == 0 and "+1.0000 [+1.0000, +1.0000]" in shown.stdout
    assert "one seed says nothing of others" in shown.stdout
    lines = invoke(compare.main, ours, "--against", theirs, "--json").stdout.splitlines()
    assert math.isclose(orjson.loads(lines[0])["difference"]["value"], 1.0)
    assert invoke(compare.main, ours, "--against", tmp_path).exit_code == 2
