"""`onesearch-simulate`: a marketplace drawn from a seed, in the KuaiSearch format (spec §9.3, spec §2.1).

The world is `marketplace_world`, what people search for `marketplace_needs`, what they do `marketplace_log`, the
tables `marketplace_tables`. Deterministic: equal arguments give equal files.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import orjson
import polars as pl
import typer

from onesearch.arrays import write_atomically
from onesearch.command import run
from onesearch.errors import ConfigError
from onesearch.progress import Meter
from training.marketplace_log import Ceilings, Log, ceilings, simulate_log
from training.marketplace_needs import SHARES, Need, build_needs
from training.marketplace_tables import build_tables, truth_frames
from training.marketplace_words import load_words, shrink
from training.marketplace_world import World, build_world
from training.tables import Format, Tables, write_tables

MIN_ITEMS, MIN_USERS, MIN_SESSIONS = 2_000, 10, 100
_MOST = 1_000_000_000


@dataclass(frozen=True)
class Marketplace:
    """A simulated marketplace: its generating process, its log, and both written as tables."""

    world: World
    needs: list[Need]
    log: Log
    tables: Tables

    def ceilings(self) -> Ceilings:
        """What knowing the intent, and knowing intent and user, would reach on the test split."""
        return ceilings(self.world, self.needs, self.log)


def simulate(
    items: int = 20_000,
    users: int = 2_000,
    sessions: int = 60_000,
    seed: int = 0,
    advance: Callable[[int], None] = lambda sessions: None,
) -> Marketplace:
    """Draw a marketplace. `advance` is told of sessions as they are done. Raises ConfigError for sizes out of range."""
    for name, value, least in (
        ("items", items, MIN_ITEMS),
        ("users", users, MIN_USERS),
        ("sessions", sessions, MIN_SESSIONS),
        ("seed", seed, 0),
    ):
        if not least <= value <= _MOST:
            raise ConfigError(f"{name}: {value}, expected {least} to {_MOST}")
    rng = np.random.default_rng(seed)
    world = build_world(shrink(load_words(), items, rng), items, users, rng)
    needs, weights = build_needs(world, rng)
    log = simulate_log(world, needs, weights, sessions, rng, advance)
    return Marketplace(world, needs, log, build_tables(world, needs, log, rng))


def write_truth(market: Marketplace, directory: Path) -> None:
    """`needs.parquet`, `queries.parquet` and `ceilings.json` in a folder of their own; the table loader ignores it."""
    directory.mkdir(parents=True, exist_ok=True)
    frames: dict[str, pl.DataFrame] = truth_frames(market.world, market.needs)
    for name, frame in frames.items():
        temporary = directory / f".{name}.tmp"
        frame.write_parquet(temporary)
        temporary.replace(directory / f"{name}.parquet")
    ceiling = orjson.dumps(asdict(market.ceilings()), option=orjson.OPT_INDENT_2)
    write_atomically(directory / "ceilings.json", ceiling)


def summary(market: Marketplace) -> str:
    """One line of sizes, query kinds, funnel and ceilings."""
    log, ceiling = market.log, market.ceilings()
    kinds = np.array([need.kind for need in market.needs])[log.need]
    shares = ", ".join(f"{kind} {np.mean(kinds == kind):.0%}" for kind in SHARES)
    queries = len(np.unique(np.stack([log.need, log.text]), axis=1).T)
    return (
        f"{len(market.world.items.type)} items, {len(market.world.users.age)} users, {len(log.user)} sessions, "
        f"{queries} distinct queries ({shares}); {int((log.clicked >= 0).sum())} clicks, "
        f"{int(log.carted.sum())} carts, {int(log.bought.sum())} orders; HR@10 of {ceiling.clicks} test clicks when "
        f"the intent is known: {ceiling.chance:.3f} chance, {ceiling.popularity:.3f} popularity, "
        f"{ceiling.oracle:.3f} true utility"
    )


def _command(
    out_dir: Annotated[Path, typer.Argument(help="Directory to write the tables to.")],
    items: Annotated[int, typer.Option(min=MIN_ITEMS)] = 20_000,
    users: Annotated[int, typer.Option(min=MIN_USERS)] = 2_000,
    sessions: Annotated[int, typer.Option(min=MIN_SESSIONS)] = 60_000,
    seed: int = 0,
    format: Annotated[str, typer.Option(help="parquet or jsonl")] = "parquet",
) -> None:
    """Simulate a marketplace: items, users, search sessions, rank rows and relevance grades."""
    if format not in ("jsonl", "parquet"):
        raise typer.BadParameter(f"{format!r}, expected parquet or jsonl", param_hint="--format")
    chosen: Format = "jsonl" if format == "jsonl" else "parquet"
    out_dir.mkdir(parents=True, exist_ok=True)
    with Meter("sessions", sessions) as meter:
        market = simulate(items, users, sessions, seed, meter.advance)
    write_tables(market.tables, out_dir, chosen)
    write_truth(market, out_dir / "truth")
    typer.echo(summary(market))


def main() -> None:
    """Console script `onesearch-simulate`."""
    run(_command)


if __name__ == "__main__":
    main()
