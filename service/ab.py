"""`onesearch-ab report`: reads the durable log of the store and says what an A/B split did, with a table and a plot."""

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from onesearch.command import HELP, start
from service.ab_report import AbReport, analyse, collect
from service.events import EventLog, Exposure, period, read_entries
from service.settings import load_settings
from service.store import open_store
from service.variants import read_experiment

_TABLE_WIDTH = 110  # columns of a table that is not shown on a terminal
app = typer.Typer(no_args_is_help=True, add_completion=False, context_settings=HELP)


@app.callback()
def _root() -> None:
    """Statistics of A/B splits."""


@app.command()
def report(
    state: Annotated[str | None, typer.Option(help="Store with the log, as ONESEARCH_STATE.")] = None,
    control: Annotated[
        str | None, typer.Option(help="Variant or arm to compare with; default: the largest.")
    ] = None,
    experiments: Annotated[
        Path | None, typer.Option(help="Experiments file, for the expected shares of the arms.")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="Compare the arms of this experiment only.")] = None,
    weights: Annotated[str | None, typer.Option(help="Expected shares, as control=50,keywords=50.")] = None,
    since: Annotated[datetime | None, typer.Option(help="First moment, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(help="First moment no longer counted, UTC.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the lifts with their intervals as a PNG.")] = None,
) -> None:
    """Per-variant CTR, CVR, orders, revenue and latency, with relative lift, 95 % interval and p-value."""
    settings = load_settings(state=state)
    found = asyncio.run(
        _report(
            lambda: open_store(settings, create=False).events,
            control,
            _expected(experiments, experiment, weights),
            experiment,
            period(since, until),
        )
    )
    if plot is not None:
        _plot(found, plot)
    if as_json:
        typer.echo(orjson.dumps(found.to_dict()).decode())
    else:
        _show(found)


async def _report(
    open_log: Callable[[], EventLog],
    control: str | None,
    weights: Mapping[str, float] | None,
    experiment: str | None,
    inside: tuple[float, float],
) -> AbReport:
    def group(exposure: Exposure) -> str | None:
        return exposure.variant if experiment is None else exposure.arms.get(experiment)

    entries = [entry async for entry in read_entries(open_log()) if inside[0] <= entry.at < inside[1]]
    return analyse(collect(entries, group), control, weights)


def _expected(path: Path | None, experiment: str | None, weights: str | None) -> Mapping[str, float] | None:
    if weights is not None:
        try:
            return {name: float(share) for name, share in (part.split("=") for part in weights.split(","))}
        except ValueError as error:
            raise typer.BadParameter(f"{weights!r}, expected NAME=SHARE,NAME=SHARE") from error
    if path is not None and experiment is not None:
        return read_experiment(path, experiment).arms
    return None


def _show(found: AbReport) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _TABLE_WIDTH
    table = Table(box=SIMPLE)
    for name in ("variant", "metric", found.control, "variant's", "lift", "95 % interval", "p"):
        table.add_column(name, justify="right" if name not in ("variant", "metric") else "left")
    for e in found.effects:
        interval = f"[{e.low:+.1%}, {e.high:+.1%}]"
        values = f"{e.control:.4g}", f"{e.treatment:.4g}", f"{e.lift:+.1%}", interval, f"{e.pvalue:.3g}"
        table.add_row(e.variant, e.metric, *values)
    console.print(table)
    counts = ", ".join(f"{name} {count}" for name, count in found.units.items())
    console.print(f"buckets: {counts}; left out: {found.left_out}", markup=False)
    for name, pvalue in found.sample_ratio.items():
        verdict = "MISMATCH: do not trust this comparison" if name in found.suspect else "as expected"
        console.print(f"sample ratio {name} to {found.control}: p = {pvalue:.3g}, {verdict}", markup=False)


def _plot(found: AbReport, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{e.metric}\n{e.variant}" for e in found.effects]
    middle: list[Any] = [100 * e.lift for e in found.effects]
    spread = [
        [100 * (e.lift - e.low) for e in found.effects],
        [100 * (e.high - e.lift) for e in found.effects],
    ]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.6 * len(labels)))
    axes.errorbar(middle, range(len(labels)), xerr=spread, fmt="o", capsize=4)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"relative difference to {found.control}, %, with 95 % interval")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """The console script `onesearch-ab`."""
    start(app)
