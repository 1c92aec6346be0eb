"""What an experiment did: log entries to one row per bucket, and tea-tasting's statistics over the rows.

The unit is the bucket, which is what was assigned at random: a user's searches are not independent. Ratios (click
rate, conversion, latency) get delta-method intervals, sums per bucket get Welch's; a sample ratio that chance does not
explain makes every other figure suspect.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import tea_tasting as tt

from onesearch.errors import InputError
from service.attribution import attribute
from service.events import Event, Exposure

SRM_ALARM = 0.001  # a sample ratio less likely than this is no accident
ATTRIBUTION_SECONDS = 24 * 3600.0
_SRM = "sample_ratio"


@dataclass
class Unit:
    """What one bucket did while one variant answered it. latency_ms is summed over its searches."""

    variant: str
    searches: int = 0
    clicks: int = 0
    carts: int = 0
    orders: int = 0
    revenue: float = 0.0
    latency_ms: float = 0.0


@dataclass
class Units:
    """One unit per bucket, and what was left out: forced searches, buckets that met several variants, stray events."""

    by_bucket: dict[str, Unit] = field(default_factory=dict)
    forced: int = 0
    mixed: set[str] = field(default_factory=set)
    stray: int = 0

    def kept(self) -> list[Unit]:
        """Units of buckets that met one variant only."""
        return [unit for bucket, unit in self.by_bucket.items() if bucket not in self.mixed]


@dataclass(frozen=True)
class Effect:
    """One metric of one variant against the control: values, relative difference with 95 % interval, p-value."""

    variant: str
    metric: str
    control: float
    treatment: float
    lift: float
    low: float
    high: float
    pvalue: float


@dataclass(frozen=True)
class AbReport:
    """units: buckets per variant. sample_ratio: p-value of each variant's share. left_out: why and how many."""

    control: str
    units: dict[str, int]
    effects: list[Effect]
    sample_ratio: dict[str, float]
    left_out: dict[str, int]

    @property
    def suspect(self) -> list[str]:
        """Variants whose number of buckets chance does not explain."""
        return [name for name, pvalue in self.sample_ratio.items() if pvalue < SRM_ALARM]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"suspect": self.suspect}


def collect(entries: Iterable[Exposure | Event], group: Callable[[Exposure], str | None]) -> Units:
    """Units of log entries. group names the variant or arm of an exposure, None leaves it out.

    Events find their search by `attribute`, those that name none within a day.
    """
    units = Units()
    searches: dict[str, Exposure] = {}
    events: list[Event] = []
    for entry in entries:
        if isinstance(entry, Event):
            if entry.type != "impression":
                events.append(entry)
        elif entry.request_id not in searches:  # the log may hold an exposure twice
            searches[entry.request_id] = entry
            _expose(units, entry, group)
    for event, search in attribute(searches, events, ATTRIBUTION_SECONDS):
        unit = units.by_bucket.get(search.bucket) if search else None
        if unit is None:
            units.stray += 1
            continue
        setattr(unit, f"{event.type}s", getattr(unit, f"{event.type}s") + 1)
        if event.type == "order":
            unit.revenue += (event.price or 0.0) * event.quantity
    return units


def _expose(units: Units, exposure: Exposure, group: Callable[[Exposure], str | None]) -> None:
    if not exposure.bucket:
        units.forced += 1
        return
    variant = group(exposure)
    if variant is None:
        return
    unit = units.by_bucket.setdefault(exposure.bucket, Unit(variant))
    if unit.variant != variant:
        units.mixed.add(exposure.bucket)
        return
    unit.searches += 1
    unit.latency_ms += exposure.latency_ms


def analyse(units: Units, control: str | None, weights: Mapping[str, float] | None = None) -> AbReport:
    """Every variant against the control (default: the one with most buckets). weights: expected shares, else equal.

    A metric of which the control has nothing is left out: there is no lift over zero. Raises InputError when there are
    fewer than two variants, the control is not one of them or one of them has no expected share above zero.
    """
    kept = units.kept()
    counts = Counter(unit.variant for unit in kept)
    if len(counts) < 2:
        raise InputError(
            "log", f"holds searches of {', '.join(counts) or 'no variant'}, expected at least two variants"
        )
    chosen = control or counts.most_common(1)[0][0]
    if chosen not in counts:
        raise InputError("control", f"{chosen!r} is not one of {', '.join(sorted(counts))}")
    shares = dict.fromkeys(counts, 1.0) if weights is None else weights
    for variant in counts:
        if not 0 < shares.get(variant, 0.0) < math.inf:
            raise InputError("weights", f"{variant!r} has {shares.get(variant)}, expected a share above 0")
    table = pa.Table.from_pylist([asdict(unit) for unit in kept])
    totals = {variant: _totals(unit for unit in kept if unit.variant == variant) for variant in counts}
    effects: list[Effect] = []
    ratios: dict[str, float] = {}
    for variant in sorted(counts.keys() - {chosen}):
        share = shares[variant] / shares[chosen]
        pair = table.filter(pa.compute.is_in(table["variant"], pa.array([chosen, variant])))
        metrics = _metrics(totals[chosen], totals[variant])
        experiment = tt.Experiment(metrics | {_SRM: tt.SampleRatio(share)}, variant="variant")
        for row in experiment.analyze(pair, control=chosen).to_dicts():
            if row["metric"] == _SRM:
                ratios[variant] = float(row["pvalue"])
            else:
                effects.append(_effect(variant, row))
    left_out = {"forced searches": units.forced, "buckets with several variants": len(units.mixed)}
    return AbReport(
        chosen, dict(sorted(counts.items())), effects, ratios, left_out | {"stray events": units.stray}
    )


def _metrics(control: Counter[str], treatment: Counter[str]) -> dict[str, Any]:
    """What can be compared: the control has some of it, and both have some of what it is counted by."""
    metrics = {
        "CTR (clicks per search)": ("clicks", "searches", tt.RatioOfMeans),
        "CVR (orders per click)": ("orders", "clicks", tt.RatioOfMeans),
        "orders per bucket": ("orders", "", tt.Mean),
        "revenue per bucket": ("revenue", "", tt.Mean),
        "latency ms per search": ("latency_ms", "searches", tt.RatioOfMeans),
    }
    return {
        name: kind(*filter(None, (of, per)))
        for name, (of, per, kind) in metrics.items()
        if control[of] and (not per or (control[per] and treatment[per]))
    }


def _totals(units: Iterable[Unit]) -> Counter[str]:
    totals: Counter[str] = Counter()
    for unit in units:
        totals.update({name: value for name, value in asdict(unit).items() if name != "variant"})
    return totals


def _effect(variant: str, row: Mapping[str, Any]) -> Effect:
    return Effect(
        variant=variant,
        metric=row["metric"],
        control=float(row["control"]),
        treatment=float(row["treatment"]),
        lift=float(row["rel_effect_size"]),
        low=float(row["rel_effect_size_ci_lower"]),
        high=float(row["rel_effect_size_ci_upper"]),
        pvalue=float(row["pvalue"]),
    )
