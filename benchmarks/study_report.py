"""Turns the runs of a study into a report: JSON, tables in Markdown, a plot. Knows no model and no data.

Legend: S seeds, V page views, U clicked items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from onesearch.arrays import write_atomically
from training.metrics import Floats, hits, paired, per_view, reciprocal

TOP = 10
RESAMPLES = 2_000
MEASURES = ("clicks HR@10", "clicks MRR@10", "orders HR@10", "orders MRR@10", "head HR@10", "tail HR@10")
_SLICES = {"head": "head queries", "tail": "tail queries"}
REFERENCE = "v1"
TITLES = {
    "3": "Table 3: reasoning data and how it is used",
    "4": "Table 4: head and tail queries",
    "5": "Table 5: step by step",
    "6": "Table 6: preference alignment",
    "7": "Table 7: teacher and student side",
    "8": "Table 8: ways to internalise reasoning",
    "user": "The user in the prompt: history, user id, cold users",
    "history": "The long history: how its vectors enter the prompt",
    "controls": "Controls: the plain loss with more steps",
}


class Named(Protocol):
    """What the report needs of a row."""

    @property
    def label(self) -> str: ...

    @property
    def tables(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Outcome:
    """ranks int64 [U], 0 for absent; view int64 [U], the page view of each clicked item; masks: slice → bool [U]."""

    ranks: npt.NDArray[np.int64]
    view: npt.NDArray[np.int64]
    masks: Mapping[str, npt.NDArray[np.bool_]]

    def values(self, measure: str) -> Floats:
        """float64, one per page view of the measure's slice."""
        name, kind = measure.split()
        keep = self.masks[_SLICES.get(name, name)]
        return per_view((hits if kind.startswith("HR") else reciprocal)(self.ranks, TOP), self.view, keep)


def estimates(
    outcomes: Mapping[str, Mapping[int, Outcome]], reference: str, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """row → measure → mean, its range over seeds and, against the reference, the paired difference with interval.

    Only seeds that both rows have are compared. The bootstrap draws seeds and page views, the same for all rows.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, runs in outcomes.items():
        found[name] = {}
        for measure in MEASURES:
            own = {s: outcome.values(measure) for s, outcome in sorted(runs.items())}
            means = [float(v.mean()) for v in own.values()]
            entry: dict[str, Any] = {"mean": float(np.mean(means)), "by_seed": means, "seeds": len(means)}
            base = outcomes.get(reference, {})
            shared = [s for s in own if s in base]
            if name != reference and shared:
                gaps = np.stack([own[s] - base[s].values(measure) for s in shared])
                entry["difference"] = asdict(paired(gaps, seed, RESAMPLES))
                entry["relative"] = entry["difference"]["value"] / max(
                    1e-9, float(np.mean([base[s].values(measure).mean() for s in shared]))
                )
            found[name][measure] = entry
    return found


def verdict(difference: Mapping[str, float]) -> str:
    """Effect, harm, or no effect found."""
    if difference["low"] > 0:
        return "effect"
    return "harm" if difference["high"] < 0 else "no effect found"


def write_report(
    folder: Path,
    study: str,
    rows: Mapping[str, Named],
    runs: Mapping[tuple[str, int], Mapping[str, Any]],
    outcomes: Mapping[str, Mapping[int, Outcome]],
    facts: Mapping[str, Any],
) -> None:
    """Write STUDY.json, STUDY.md and STUDY.png into a folder."""
    found = estimates(outcomes, REFERENCE)
    costs = {
        name: float(np.mean([r["train_seconds"] for (n, _), r in runs.items() if n == name])) for name in found
    }
    made = {key: sorted({str(r[key]) for r in runs.values()}) for key in ("hardware", "torch")}
    made["dates"] = sorted({str(r["date"])[:10] for r in runs.values()})
    document = {
        "facts": {**facts, **made},
        "reference": REFERENCE,
        "rows": [
            {
                "row": n,
                "label": rows[n].label,
                "tables": rows[n].tables,
                "train_seconds": costs[n],
                "measures": found[n],
            }
            for n in rows
            if n in found
        ],
        "not run": [name for name in rows if name not in found],
    }
    write_atomically(folder / f"{study}.json", orjson.dumps(document, option=orjson.OPT_INDENT_2))
    write_atomically(folder / f"{study}.md", _markdown(study, document, rows, found, costs).encode())
    if found:
        _plot(folder / f"{study}.png", rows, found)


def _markdown(
    study: str,
    document: Mapping[str, Any],
    rows: Mapping[str, Named],
    found: Mapping[str, Any],
    costs: Mapping[str, float],
) -> str:
    command = "`make study` (`python -m benchmarks.study`)"
    if study != "ablation":
        command = f"`python -m benchmarks.study --study {study}`"
    lines = [
        f"# {study.capitalize()} study on the simulated marketplace",
        "",
        f"{command}; values are means over seeds; differences to the V1 baseline are",
        "paired by seed and page view, with 95 % bootstrap intervals over seeds and page views.",
        "",
        *(f"- {name}: {value}" for name, value in document["facts"].items()),
        f"- rows without a run: {', '.join(document['not run']) or 'none'}",
    ]
    for table, title in TITLES.items():
        names = [n for n, row in rows.items() if n in found and (table in row.tables or n == REFERENCE)]
        if len(names) > 1:
            lines += ["", f"## {title}", "", *_table(names, rows, found, costs)]
    return "\n".join(lines) + "\n"


def _table(
    names: Sequence[str], rows: Mapping[str, Named], found: Mapping[str, Any], costs: Mapping[str, float]
) -> list[str]:
    head = ["row", "seeds", "train s", *MEASURES, "clicks HR@10 - V1", "verdict", "orders HR@10 - V1", "verdict"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name in names:
        own = found[name]
        cells = [rows[name].label, str(own[MEASURES[0]]["seeds"]), f"{costs[name]:.0f}"]
        cells += [f"{own[measure]['mean']:.4f}" for measure in MEASURES]
        for measure in ("clicks HR@10", "orders HR@10"):
            gap = own[measure].get("difference")
            cells += (
                [f"{gap['value']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]", verdict(gap)] if gap else ["", ""]
            )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _plot(path: Path, rows: Mapping[str, Named], found: Mapping[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [n for n in rows if n in found and "difference" in found[n]["clicks HR@10"]]
    if not names:
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 1 + 0.32 * len(names)), sharey=True)
    for axes, measure in zip(panels, ("clicks HR@10", "orders HR@10"), strict=True):
        gaps = [found[n][measure]["difference"] for n in names]
        spread = [[g["value"] - g["low"] for g in gaps], [g["high"] - g["value"] for g in gaps]]
        axes.errorbar([g["value"] for g in gaps], range(len(names)), xerr=spread, fmt="o", capsize=3)
        axes.axvline(0, color="grey", linewidth=1)
        axes.set_title(f"{measure}: difference to V1")
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(names)), [rows[n].label for n in names])
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
