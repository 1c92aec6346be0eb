"""`python -m training.compare A.json … --against B.json …`: is one recipe better, over requests and seeds?

Reads reports that `onesearch-eval --out` wrote, one per training seed. Runs are paired by the seed of their recipe and
by page view; the bootstrap draws both. One seed tells about requests only, and the output says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import orjson
import typer

from onesearch.command import run
from onesearch.errors import DataError
from training.metrics import Estimate, Floats, hits, paired, per_view, reciprocal

_MEASURES = {"HR@10": hits, "MRR@10": reciprocal}
_TOP = 10


@dataclass(frozen=True)
class Run:
    """One report. Legend: U clicked items. session, rank int64 [U] (rank 0: absent); slices: name → kept units."""

    seed: int
    session: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    slices: Mapping[str, npt.NDArray[np.bool_]]

    def values(self, measure: str, name: str) -> Floats:
        """float64, one per page view of a slice."""
        views = np.unique(self.session, return_inverse=True)[1]
        return per_view(_MEASURES[measure](self.rank, _TOP), views, self.slices[name])


def read_run(path: Path) -> Run:
    """Read a report. Raises DataError when it is none, or one on human ratings."""
    try:
        raw: dict[str, Any] = orjson.loads(path.read_bytes())
        units, facts = raw["units"], raw["run"]
        session, rank = (np.asarray(units[name], dtype=np.int64) for name in ("session", "rank"))
        slices = {name: np.isin(np.arange(len(rank)), kept) for name, kept in units["slices"].items()}
        return Run(int(facts["recipe_seed"]), session, rank, slices)
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(str(path), [f"is no report on logs that onesearch-eval wrote ({error!r})"]) from error


def compare_runs(
    ours: Sequence[Run], theirs: Sequence[Run], seed: int = 1
) -> dict[tuple[str, str], tuple[float, Estimate]]:
    """(slice, measure) → mean of ours, and the paired difference. Raises DataError when runs do not pair."""
    mine, base = ({run.seed: run for run in runs} for runs in (ours, theirs))
    faults = [f"two reports of seed {s}" for runs in (ours, theirs) for s in _repeated(runs)]
    if mine.keys() != base.keys():
        faults.append(f"seeds {sorted(mine)} against {sorted(base)}, expected the same")
    first = ours[0]
    if any(not np.array_equal(run.session, first.session) for run in (*ours, *theirs)):
        faults.append("they asked different page views, expected the same")
    if faults:
        raise DataError("reports", faults)
    found = {}
    for name in first.slices:
        for measure in _MEASURES:
            if first.slices[name].any():
                own = np.stack([mine[s].values(measure, name) for s in sorted(mine)])
                gaps = own - np.stack([base[s].values(measure, name) for s in sorted(mine)])
                found[name, measure] = (float(own.mean()), paired(gaps, seed))
    return found


def _repeated(runs: Sequence[Run]) -> list[int]:
    seeds = [run.seed for run in runs]
    return sorted({s for s in seeds if seeds.count(s) > 1})


def _command(
    reports: Annotated[list[Path], typer.Argument(help="reports of one recipe, one per training seed")],
    against: Annotated[list[Path], typer.Option(help="a report of the other recipe; give it once per seed")],
    seed: Annotated[int, typer.Option(min=0, help="of the bootstrap")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per line")] = False,
) -> None:
    """Paired differences with 95 % intervals over requests and training seeds."""
    ours = [read_run(path) for path in reports]
    found = compare_runs(ours, [read_run(path) for path in against], seed)
    for (name, measure), (mean, gap) in found.items():
        if as_json:
            row = {"slice": name, "measure": measure, "mean": mean, "difference": gap, "seeds": len(ours)}
            typer.echo(orjson.dumps(row).decode())
        else:
            typer.echo(f"{name:24} {measure:8} {mean:.4f}  {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]")
    if not as_json:
        over = (
            f"page views and {len(ours)} seeds" if len(ours) > 1 else "page views; one seed says nothing of others"
        )
        typer.echo(f"[…] 95 % paired bootstrap over {over}")


def main() -> None:
    """Console entry point."""
    run(_command)


if __name__ == "__main__":
    main()
