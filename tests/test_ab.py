"""The A/B report: hand-made logs give hand-computed figures; A/A splits are called different as often as promised."""

from pathlib import Path

import numpy as np
import pytest
from command_line import invoke

from onesearch.command import REFUSED
from onesearch.errors import InputError
from service import ab
from service.ab_report import Unit, Units, analyse, collect
from service.events import Event, Exposure


def exposure(request: str, variant: str, bucket: str, at: float = 0.0, **more: object) -> Exposure:
    shown = {"user_id": f"u-{bucket}", "query": "shoes", "items": (1, 2, 3), "latency_ms": 10.0, "arms": {}} | more
    return Exposure(request_id=request, variant=variant, bucket=bucket, at=at, **shown)  # type: ignore[arg-type]


def event(kind: str, bucket: str, at: float = 1.0, **more: object) -> Event:
    given = {"event_id": f"e{at}{kind}{bucket}", "item_id": 2, "user_id": f"u-{bucket}"} | more
    return Event(type=kind, at=at, **given)  # type: ignore[arg-type]


def test_events_find_their_search_by_request_then_by_user_and_item() -> None:
    entries = [
        exposure("r1", "a", "x"),
        exposure("r2", "b", "y", latency_ms=30.0),
        exposure("r2", "b", "y", latency_ms=30.0),  # the log may hold an exposure twice
        exposure("r3", "b", "y", at=5.0, latency_ms=50.0),
        event("impression", "x", request_id="r1"),
        event("click", "x", request_id="r1"),
        event("click", "y", at=6.0),
        event("order", "y", at=7.0, price=12.5, quantity=2),
        event("click", "y", at=8.0, item_id=99),  # never shown to this user
        event("click", "y", at=6.0 + 25 * 3600),  # a day later
        event("click", "nobody"),
    ]
    units = collect(entries, lambda e: e.variant)
    assert units.by_bucket == {
        "x": Unit("a", searches=1, clicks=1, latency_ms=10.0),
        "y": Unit("b", searches=2, clicks=1, orders=1, revenue=25.0, latency_ms=80.0),
    }
    assert units.stray == 3


def test_forced_searches_and_buckets_of_several_variants_are_left_out_and_counted() -> None:
    entries = [
        exposure("r1", "a", "x"),
        exposure("r2", "b", "x"),
        exposure("r3", "b", ""),
        exposure("r4", "b", "z"),
    ]
    units = collect(entries, lambda e: e.variant)
    assert units.mixed == {"x"} and units.forced == 1
    assert units.kept() == [Unit("b", searches=1, latency_ms=10.0)]
    with pytest.raises(InputError, match="at least two variants"):
        analyse(units, None)


def test_arms_of_one_experiment_are_compared_and_everybody_else_is_left_out() -> None:
    entries = [
        exposure("r1", "wide", "x", arms={"width": "wide"}),
        exposure("r2", "control", "y", arms={"width": "control"}),
        exposure("r3", "control", "z", arms={}),
    ]
    units = collect(entries, lambda e: e.arms.get("width"))
    assert {bucket: unit.variant for bucket, unit in units.by_bucket.items()} == {"x": "wide", "y": "control"}


def drawn(rng: np.random.Generator, count: int, lift: float = 0.0, share: float = 0.5) -> Units:
    """Buckets of two variants with searches, clicks and orders; `lift` multiplies the click rate of the second."""
    units = Units()
    taste = rng.beta(4, 8, count)  # how often a user clicks; this is what makes searches of one bucket depend
    searches = 1 + rng.poisson(3, count)
    second = rng.random(count) < share
    clicks = rng.binomial(searches, np.minimum(taste * np.where(second, 1 + lift, 1), 1))
    orders = rng.binomial(clicks, 0.2)
    for i in range(count):
        units.by_bucket[str(i)] = Unit(
            "new" if second[i] else "old",
            searches=int(searches[i]),
            clicks=int(clicks[i]),
            orders=int(orders[i]),
            revenue=float(orders[i] * 10),
            latency_ms=float(searches[i] * 20 + rng.normal()),
        )
    return units


def test_figures_equal_their_definition() -> None:
    units = drawn(np.random.default_rng(0), 3000)
    report = analyse(units, "old")
    sums = {
        v: np.sum([[u.clicks, u.searches, u.orders] for u in units.kept() if u.variant == v], axis=0)
        for v in ("old", "new")
    }
    found = {e.metric: e for e in report.effects}
    ctr = found["CTR (clicks per search)"]
    assert ctr.control == pytest.approx(sums["old"][0] / sums["old"][1])
    assert ctr.treatment == pytest.approx(sums["new"][0] / sums["new"][1])
    assert ctr.lift == pytest.approx(ctr.treatment / ctr.control - 1)
    assert found["orders per bucket"].control == pytest.approx(sums["old"][2] / report.units["old"])
    assert ctr.low < ctr.lift < ctr.high
    assert report.suspect == []


def test_equal_variants_are_called_different_in_about_one_of_twenty() -> None:
    rng = np.random.default_rng(1)
    alarms = np.array([[e.pvalue < 0.05 for e in analyse(drawn(rng, 200), "old").effects] for _ in range(200)])
    # 99.9 % of the time a true rate of 5 % shows as 0.005 to 0.105 over 200 experiments.
    assert ((alarms.mean(axis=0) > 0.004) & (alarms.mean(axis=0) < 0.106)).all(), alarms.mean(axis=0)
    assert 0.03 < alarms.mean() < 0.07


def test_a_planted_effect_is_found_and_its_interval_covers_it() -> None:
    rng = np.random.default_rng(2)
    found = [next(iter(analyse(drawn(rng, 2000, lift=0.15), "old").effects)) for _ in range(20)]
    assert np.mean([e.pvalue < 0.05 for e in found]) > 0.9
    assert np.mean([e.low < 0.15 < e.high for e in found]) > 0.85


def test_a_split_that_leans_is_a_sample_ratio_mismatch() -> None:
    leaning = drawn(np.random.default_rng(3), 4000, share=0.44)
    assert analyse(leaning, "old").suspect == ["new"]
    assert analyse(leaning, "old", {"old": 0.56, "new": 0.44}).suspect == []


@pytest.mark.filterwarnings("error")
def test_what_the_control_has_nothing_of_is_left_out() -> None:
    units = drawn(np.random.default_rng(4), 200)
    for unit in units.by_bucket.values():
        unit.revenue = 0.0
        unit.orders = unit.clicks = 0 if unit.variant == "new" else unit.clicks
    shown = {e.metric: e for e in analyse(units, "old").effects}
    assert set(shown) == {"CTR (clicks per search)", "orders per bucket", "latency ms per search"}
    assert shown["CTR (clicks per search)"].lift == -1.0


@pytest.mark.parametrize("weights", [{"old": 1.0}, {"old": 1.0, "new": 0.0}, {"old": 1.0, "new": float("nan")}])
def test_every_variant_needs_an_expected_share(weights: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"weights: 'new' has .*, expected a share above 0"):
        analyse(drawn(np.random.default_rng(5), 50), "old", weights)


def test_a_store_that_is_not_there_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    ran = invoke(ab.main, "report", "--state", f"sqlite:{tmp_path / 'state.sqlite3'}", name="onesearch-ab")
    assert ran.exit_code == REFUSED
    assert (
        ran.stderr
        == f"onesearch-ab: state: {tmp_path / 'state.sqlite3'} is no file, expected the store of a service\n"
    )
    assert list(tmp_path.iterdir()) == []
