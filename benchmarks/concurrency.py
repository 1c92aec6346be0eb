"""Searches at the same time on the embedded runner, and what a narrower beam costs.

`python -m benchmarks.concurrency [--bundle DIR] [--precision fp32|int8] [--seconds S] [--json]`

*Callers*: 1, 2, 4 and 8 callers, each asking again as soon as it is answered, under three ways to share two cores:
threads of one search x searches at a time. Throughput and p50/p99 of the time a caller waits, in milliseconds.

*Ladder*: widths 512, 256 and 128 on the bundle's held-out searches: HR@10 and MRR@10 of clicked items, overlap of the
top 10 with width 512, and the paired difference to it with its 95 % bootstrap interval.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from onesearch.bundle import Bundle, HeldOut, open_bundle, read_held_out
from onesearch.hardware import hardware
from onesearch.runtime import Precision, open_decoder
from onesearch.search import Searcher, SearchOptions
from service.inference import EmbeddedRunner, own_cores, search_threads
from training.metrics import bootstrap

SHARES = ((1, 2), (2, 1), (2, 2))
"""Threads of one search, searches at a time."""
CALLERS, WIDTHS, TOP = (1, 2, 4, 8), (512, 256, 128), 10


def open_searcher(bundle: Bundle, threads: int, precision: Precision) -> Searcher:
    """The bundle's searcher as the service opens it."""
    if bundle.graphs is None or precision not in bundle.graph_stamp["parity"]:
        raise SystemExit(f"{bundle.path} has no {precision} graphs: onesearch-export --precision {precision}")
    renderer = bundle.renderer
    return Searcher(bundle, open_decoder(bundle.graphs, renderer.sids, renderer.bos, threads, precision))


async def closed_loop(
    searcher: Searcher, searches: tuple[HeldOut, ...], concurrency: int, callers: int, seconds: float
) -> dict[str, Any]:
    """Throughput and waiting times of callers that ask one search after the other."""
    threads = search_threads(concurrency, own_cores(concurrency))
    runner, options = EmbeddedRunner(searcher, threads), SearchOptions()
    waits: list[float] = []
    start = time.perf_counter()

    async def caller(number: int) -> None:
        position = number * len(searches) // callers
        while time.perf_counter() - start < seconds:
            asked = time.perf_counter()
            await runner.search(searches[position % len(searches)].context, options)
            waits.append((time.perf_counter() - asked) * 1e3)
            position += 1

    await asyncio.gather(*(caller(number) for number in range(callers)))
    spent = time.perf_counter() - start
    await runner.close()
    p50, p99 = np.percentile(waits, [50, 99])
    return {
        "searches": len(waits),
        "per_second": round(len(waits) / spent, 1),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
    }


def ladder(searcher: Searcher, searches: tuple[HeldOut, ...]) -> list[dict[str, Any]]:
    """One row per width."""
    ids = searcher.bundle.catalog.item_ids
    shown: dict[int, list[list[int]]] = {}
    times: dict[int, list[float]] = {}
    for width in WIDTHS:
        results = [searcher.search(search.context, SearchOptions(limit=TOP, width=width)) for search in searches]
        shown[width] = [ids[result.rows].tolist() for result in results]
        times[width] = [sum(result.timings_ms.values()) for result in results]
    clicked = [set(search.clicked) for search in searches]
    columns: dict[str, list[float]] = {}
    for width in WIDTHS:
        ranks = [
            [i for i, item in enumerate(page) if item in c] for page, c in zip(shown[width], clicked, strict=True)
        ]
        columns[f"hr_{TOP}_{width}"] = [float(bool(rank)) for rank in ranks]
        columns[f"mrr_{TOP}_{width}"] = [1 / (rank[0] + 1) if rank else 0.0 for rank in ranks]
        pairs = zip(shown[WIDTHS[0]], shown[width], strict=True)
        columns[f"overlap_{width}"] = [len(set(a) & set(b)) / max(1, len(a)) for a, b in pairs]
        columns[f"change_{width}"] = np.subtract(
            columns[f"hr_{TOP}_{width}"], columns[f"hr_{TOP}_{WIDTHS[0]}"]
        ).tolist()
    estimates = dict(zip(columns, bootstrap(np.array(list(columns.values())).T, seed=0), strict=True))
    return [
        {
            "width": width,
            "searches": len(searches),
            f"hr_{TOP}": round(estimates[f"hr_{TOP}_{width}"].value, 4),
            f"mrr_{TOP}": round(estimates[f"mrr_{TOP}_{width}"].value, 4),
            f"overlap_top_{TOP}": round(estimates[f"overlap_{width}"].value, 4),
            f"hr_{TOP}_change": [
                round(float(x), 4) for x in (change.value, change.low or 0.0, change.high or 0.0)
            ],
            "p50_ms": round(float(np.median(times[width])), 1),
        }
        for width in WIDTHS
        for change in [estimates[f"change_{width}"]]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time concurrent searches and price a narrower beam.")
    parser.add_argument("--bundle", type=Path, default=Path("demo/bundle"))
    parser.add_argument("--precision", choices=["fp32", "int8"], default="fp32")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement of callers")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and nothing else")
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    searches = read_held_out(arguments.bundle)
    if not searches:
        raise SystemExit(f"{arguments.bundle} has no held-out searches; train it again")
    same = {"hardware": hardware(), "precision": arguments.precision}

    def show(row: dict[str, Any]) -> None:
        print(
            json.dumps(same | row) if arguments.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True
        )

    for threads, concurrency in SHARES:
        searcher = open_searcher(bundle, threads, arguments.precision)
        for callers in CALLERS:
            row = asyncio.run(closed_loop(searcher, searches, concurrency, callers, arguments.seconds))
            show({"threads": threads, "concurrency": concurrency, "callers": callers} | row)
    for rung in ladder(open_searcher(bundle, 2, arguments.precision), searches):
        show(rung)


if __name__ == "__main__":
    main()
