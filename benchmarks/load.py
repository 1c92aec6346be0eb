"""Open-loop load on a real bundle, up to and past saturation.

`python -m benchmarks.load [--bundle demo/bundle] [--json] [--plot benchmarks/studies/load.png]`

Searches arrive by a Poisson process whatever the service does, and latency counts from the time each was meant to be
sent (no coordinated omission). One row per phase: a sweep of rates, then 70 % and 200 % of saturation and half of it
right after. Saturation is the highest goodput of the sweep; goodput counts answers (200) that arrived in the phase.
Recall is the share of the ten items of the full-width answer, taken afterwards from the idle service, that were in
the answer under load; over anonymous searches, because histories move on. The last row compares with the bars.
"""

import argparse
import asyncio
import gc
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import uvloop

from benchmarks.traffic import EVENTS, SEARCH, Ask, Traffic, vocabulary
from benchmarks.wire import Client, Server, report, serving
from onesearch.hardware import hardware

SWEEP = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Rates of the sweep as multiples of what two full-width searches at a time would give."""
TOP, UNLOADED, RECALLED, TRIES = 10, 80, 300, 5
NARROW, NO_STATE = "narrow_beam", "state_unavailable"


@dataclass(frozen=True, slots=True)
class Sample:
    """One search: when it was meant to be sent, was sent and was answered (`time.perf_counter()`), and with what.

    Of the answer only what is reported: a generator that keeps whole answers is stopped by its garbage collector.
    """

    ask: Ask
    due: float
    sent: float
    done: float
    status: int
    variant: str = ""
    degraded: tuple[str, ...] = ()
    top: frozenset[int] = frozenset()

    @property
    def good(self) -> bool:
        """Whether the search was answered."""
        return self.status == 200

    @property
    def ms(self) -> float:
        """Latency from the intended time."""
        return (self.done - self.due) * 1e3


class Load:
    """A generator of shoppers against one server. clicks counts its click events by what became of them."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server, self._client = server, Client(server.port)
        self._traffic, self._chance = Traffic(*vocabulary(server.get), seed), random.Random(seed)
        self.clicks: Counter[str] = Counter()

    async def search(self, ask: Ask, due: float) -> tuple[Sample, dict[str, Any]]:
        """Send one search now; also its answer, empty if there was none."""
        sent = time.perf_counter()
        reply = await self._client.post(SEARCH, orjson.dumps(ask.body), ask.headers)
        done = time.perf_counter()
        if reply.status != 200:
            return Sample(ask, due, sent, done, reply.status), {}
        answer = orjson.loads(reply.body)
        top = frozenset(item["item_id"] for item in answer["items"][:TOP])
        told = answer["variant"], tuple(answer["degraded"])
        return Sample(ask, due, sent, done, reply.status, *told, top), answer

    async def unloaded(self, count: int) -> list[float]:
        """Latencies in milliseconds of searches one after the other."""
        return [(await self.search(self._traffic.search(), time.perf_counter()))[0].ms for _ in range(count)]

    async def phase(self, rate: float, seconds: float) -> tuple[list[Sample], float]:
        """Poisson arrivals at a rate; the samples and the start."""
        start = due = time.perf_counter()
        self.clicks.clear()
        tasks = []
        while (due := due + self._chance.expovariate(rate)) < start + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self._shop(due)))
        return list(await asyncio.gather(*tasks)), start

    async def _shop(self, due: float) -> Sample:
        ask = self._traffic.search()
        sample, answer = await self.search(ask, due)
        if answer and (click := self._traffic.click(ask, answer)):
            await self._click(orjson.dumps(click))
        return sample

    async def _click(self, body: bytes) -> None:
        """Send a click until it is accepted, as clients should."""
        for attempt in range(TRIES):
            reply = await self._client.post(EVENTS, body)
            if reply.status == 202:
                self.clicks["late" if attempt else "accepted"] += 1
                return
            await asyncio.sleep(1)
        self.clicks["lost"] += 1

    async def recall(self, samples: Sequence[Sample]) -> list[float]:
        """The share of the full-width top ten in each anonymous answer, a part of them drawn by chance."""
        anonymous = [s for s in samples if s.good and "user_id" not in s.ask.body]
        found = []
        for sample in self._chance.sample(anonymous, min(RECALLED, len(anonymous))):
            again = Ask(sample.ask.body, {"X-OneSearch-Variant": sample.variant})
            full, _ = await self.search(again, time.perf_counter())
            if not full.good or NARROW in full.degraded:
                raise SystemExit("recall: an idle service did not answer at full width")
            if full.top:
                found.append(len(full.top & sample.top) / len(full.top))
        return found


def summary(name: str, rate: float, seconds: float, samples: Sequence[Sample], start: float) -> dict[str, Any]:
    """The row of a phase, without recall."""
    good = [s for s in samples if s.good]
    spent = sorted(s.ms for s in good)
    statuses = Counter(s.status for s in samples if not s.good)
    told = Counter(reason for s in good for reason in s.degraded)
    return {
        "phase": name,
        "rate": round(rate, 1),
        "sent": len(samples),
        "goodput": round(sum(s.done <= start + seconds for s in good) / seconds, 1),
        "p50_ms": quantile(spent, 0.5),
        "p99_ms": quantile(spent, 0.99),
        "p999_ms": quantile(spent, 0.999),
        "refused": statuses.pop(503, 0),
        "other_errors": {str(status): count for status, count in sorted(statuses.items())},
        "narrowed": round(told[NARROW] / max(1, len(good)), 3),
        "without_state": told[NO_STATE],
        "generator_late_p99_ms": quantile(sorted((s.sent - s.due) * 1e3 for s in samples), 0.99),
    }


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """A value of an ordered sequence; None of an empty one."""
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else None


def recovery(samples: Sequence[Sample], start: float, limit_ms: float) -> float | None:
    """Seconds until searches are answered, and by the second half of them within the limit, for good; None if never."""
    last = int(max(s.due - start for s in samples))
    settled = None
    for second in range(last, -1, -1):
        window = [s for s in samples if second <= s.due - start < second + 1]
        if any(not s.good for s in window) or (window and statistics.median(s.ms for s in window) > limit_ms):
            break
        settled = second
    return None if settled is None else float(settled)


async def measure(server: Server, concurrency: int, seconds: float, seed: int) -> list[dict[str, Any]]:
    """All rows."""
    load = Load(server, seed)
    gc.disable()  # a generator that stops to look for garbage is late
    await load.unloaded(UNLOADED)
    idle = statistics.median(await load.unloaded(UNLOADED))
    single = concurrency * 1e3 / idle
    rows: list[dict[str, Any]] = []
    kept: dict[str, list[Sample]] = {}

    async def run(name: str, rate: float, length: float = seconds) -> tuple[dict[str, Any], list[Sample], float]:
        samples, start = await load.phase(rate, length)
        row = summary(name, rate, length, samples, start) | {"clicks": dict(load.clicks)}
        rows.append(row | {"memory_mb": round(server.memory_mb(), 1)})
        kept[name] = samples
        return rows[-1], samples, start

    for multiple in SWEEP:
        await run(f"{multiple:g} x", multiple * single)
        await asyncio.sleep(1)
    saturation = max(row["goodput"] for row in rows)
    calm, _, _ = await run("70 %", 0.7 * saturation, 2 * seconds)
    past, _, _ = await run("200 %", 2 * saturation, 2 * seconds)
    _, samples, start = await run("after", 0.5 * saturation)
    back = recovery(samples, start, 2 * idle)
    await asyncio.sleep(1)  # until the service is idle again and beams are wide
    for row in rows:
        shares = await load.recall(kept[row["phase"]])
        row["recall"] = round(statistics.fmean(shares), 4) if shares else None
    memory = [row["memory_mb"] for row in rows]
    verdict = {
        "hardware": hardware(),
        "unloaded_p50_ms": round(idle, 1),
        "saturation": saturation,
        "p99_at_70_over_unloaded_p50": round((calm["p99_ms"] or 0) / idle, 2),
        "goodput_at_200_share": round(past["goodput"] / saturation, 3),
        "other_5xx": sum(c for row in rows for s, c in row["other_errors"].items() if s >= "5"),
        "lost": sum(row["other_errors"].get("0", 0) for row in rows),
        "clicks_late": sum(row["clicks"].get("late", 0) for row in rows),
        "clicks_lost": sum(row["clicks"].get("lost", 0) for row in rows),
        "memory_growth": round(memory[-1] / memory[-3], 3),
        "recovery_s": back,
    }
    return [*rows, verdict]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Latency and what became of the searches, over the rate."""
    from matplotlib.figure import Figure

    sweep = sorted((row for row in rows if row.get("phase") != "after" and "rate" in row), key=lambda r: r["rate"])
    rates = [row["rate"] for row in sweep]
    figure = Figure(figsize=(10, 4), layout="constrained")
    latency, fate = figure.subplots(1, 2)
    for name in ("p50_ms", "p99_ms", "p999_ms"):
        latency.plot(rates, [row[name] for row in sweep], marker="o", label=name.removesuffix("_ms"))
    latency.set(xlabel="searches/s offered", ylabel="latency from intended time, ms", yscale="log")
    fate.plot(rates, rates, color="lightgrey", label="offered")
    fate.plot(rates, [row["goodput"] for row in sweep], marker="o", label="answered")
    fate.plot(rates, [row["goodput"] * (1 - row["narrowed"]) for row in sweep], marker="o", label="at full width")
    fate.set(xlabel="searches/s offered", ylabel="searches/s")
    share = fate.twinx()
    share.plot(rates, [row["recall"] for row in sweep], color="black", linestyle="--", label="recall@10")
    share.set(ylim=(0, 1.05), ylabel="recall@10 against full width")
    for axes in (latency, fate, share):
        axes.legend(loc="lower right" if axes is share else "upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Open-loop load up to and past saturation.")
    parser.add_argument("--bundle", type=Path, default=Path("demo/bundle"))
    parser.add_argument("--seconds", type=float, default=10, help="length of one phase of the sweep")
    parser.add_argument("--concurrency", type=int, default=1, help="searches at a time, per process")
    parser.add_argument("--workers", type=int, default=2, help="processes that serve; one a core by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and nothing else")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "ONESEARCH_STATE": f"sqlite:{folder}/state.sqlite3",
            "ONESEARCH_CATALOG": f"{folder}/catalog",
            "ONESEARCH_CONCURRENCY": str(arguments.concurrency),
            "ONESEARCH_WORKERS": str(arguments.workers),
            "ONESEARCH_NOTICE_SECONDS": "0",
        }
        program = "from service.cli import main; main()"
        # Shoppers do not wait for the machine that serves them: the server yields to the generator beside it.
        server_command = [sys.executable, "-c", program, str(arguments.bundle.resolve()), "--port"]
        command = ["nice", "-n", "10", *server_command]
        with serving(command, settings) as server:
            concurrency = arguments.concurrency * arguments.workers
            rows = uvloop.run(measure(server, concurrency, arguments.seconds, arguments.seed))
    for row in rows:
        report(row, arguments.json)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
