"""What the gateway costs around the model: real HTTP, real Redis, a model that answers at once.

`python -m benchmarks.gateway [--json]`

- overhead_*: latency at the client of personalised searches for 20 items, Poisson arrivals at 50 requests/s,
  counted from the time each request was meant to be sent.
- ratio_bare: requests/s of one worker, 16 connections that always have a request out, over those of a bare FastAPI
  application that validates the same body and returns as many bytes. Both get the same requests, in turns; the median
  over rounds. *_cpu_us is the processor time of the server per request, the lowest of the rounds, which other work
  on the machine disturbs least. ratio_bare_personalised is the same with user histories in Redis.

Answers are checked before anything is timed.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvicorn
import uvloop
from fastapi import FastAPI, Response

from benchmarks.wire import Client, Server, redis, report, serving
from onesearch.catalog import Catalog, Item, write_catalog
from onesearch.context import SearchContext
from onesearch.hardware import hardware
from onesearch.live import LiveCatalog
from onesearch.search import SearchOptions, SearchResult
from service.app import create_app
from service.deployment import Deployment, Engine
from service.schemas import SearchRequest
from service.settings import load_settings
from service.store import open_store
from service.variants import VariantOptions, WeightedSplit
from service.workers import serve_app
from trie import SidTrie

ITEMS, LIMIT, USERS, CONNECTIONS = 2000, 20, 500, 16
QUERY = "waterproof trail running shoes"


class InstantModel:
    """A runner that has the answer ready."""

    def __init__(self, live: LiveCatalog) -> None:
        stages = ("understand", "mask", "prefill", "decode", "expand")
        self._live, self._sid = live, np.zeros(5, dtype=np.uint16)
        self._rows, self._timings = np.arange(LIMIT), dict.fromkeys(stages, 0.0)
        self._scores = np.linspace(-1, -9, LIMIT, dtype=np.float32)

    async def search(self, context: SearchContext, options: SearchOptions) -> SearchResult:
        """The same twenty items for everyone."""
        timings = dict(self._timings)
        beams, snapshot = (1, 256, 512, 512, 20), self._live.snapshot
        return SearchResult(snapshot, self._rows, self._scores, self._sid, (), beams, timings, ITEMS)

    async def close(self) -> None:
        """Nothing to close."""


def catalog(folder: Path) -> LiveCatalog:
    """Items with fields as full as those of the simulated marketplace."""
    attributes = (("colour", "forest green"), ("material", "recycled polyester"), ("closure", "laces"))
    items = [
        Item(
            item_id=1000 + i,
            title=f"Fleetfoot trail running shoes with waterproof membrane, model {i}",
            brand="Fleetfoot",
            category=("Sports", "Running", "Shoes"),
            price=79.9 + i,
            attributes=attributes,
        )
        for i in range(ITEMS)
    ]
    columns = [np.arange(ITEMS) // 256, np.arange(ITEMS) % 256, *[np.zeros(ITEMS)] * 3]
    sids = np.stack(columns, axis=1).astype(np.uint16)
    write_catalog(folder, items, sids, np.zeros(ITEMS, dtype=np.float32))
    return LiveCatalog(
        Catalog(folder), SidTrie.build(sids, (8, 256, 1, 1, 1)), "c1", lambda texts: sids[: len(texts)]
    )


def serve_gateway(folder: Path, port: int) -> None:
    """Serve the real application over the instant model until stopped; the environment has the settings."""
    live = catalog(folder)
    settings = load_settings(port=port, catalog=folder / "catalog", notice_seconds=0)
    engine = Engine("bench", "m1", "bench", live, InstantModel(live), check=lambda: [])
    deployment = Deployment([engine], WeightedSplit({"default": VariantOptions(bundle="bench")}))
    serve_app(create_app(settings, deployment, open_store(settings)), settings)


def serve_bare(size: int, port: int) -> None:
    """Serve the bare application, whose answers have `size` bytes."""
    app = FastAPI()
    body = orjson.dumps({"items": "x" * (size - len('{"items":""}'))})

    @app.post("/v1/search")
    async def search(body_: SearchRequest) -> Response:
        return Response(body, media_type="application/json")

    uvicorn.run(app, port=port, loop="uvloop", http="httptools", access_log=False, log_level="warning")


def body(user: int | None = None) -> bytes:
    """The request that everyone is asked."""
    asked: dict[str, Any] = {"query": QUERY, "limit": LIMIT, "filters": {"in_stock": True}}
    return orjson.dumps(asked if user is None else asked | {"user_id": f"user-{user}"})


async def check(server: Server) -> int:
    """Whether answers are what they should be; the size of an anonymous one. Raises SystemExit if not."""
    client, size = Client(server.port), 0
    for user in (*range(USERS), 0, None):
        reply = await client.post("/v1/search", body(user))
        answer = orjson.loads(reply.body)
        if reply.status != 200 or len(answer["items"]) != LIMIT or "state_unavailable" in answer["degraded"]:
            raise SystemExit(f"wrong answer for user {user}: {reply.status} {reply.body[:300]!r}")
        size = len(reply.body)
    client.close()
    return size


async def overhead(server: Server, rate: float, seconds: float) -> list[float]:
    """Milliseconds of each request at Poisson arrivals, from its intended time."""
    client, chance, spent, tasks = Client(server.port), random.Random(1), [], []

    async def one(due: float) -> None:
        reply = await client.post("/v1/search", body(chance.randrange(USERS)))
        spent.append((time.perf_counter() - due) * 1e3 if reply.status == 200 else float("inf"))

    due = time.perf_counter()
    end = due + seconds
    while (due := due + chance.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due)))
    await asyncio.gather(*tasks)
    client.close()
    return spent


async def throughput(server: Server, seconds: float, personalised: bool) -> tuple[float, float]:
    """Requests/s over connections that always have one out, and microseconds of processor time per request."""
    client, chance, done = Client(server.port), random.Random(2), 0
    used, end = server.processor_seconds(), time.perf_counter() + seconds

    async def loop() -> None:
        nonlocal done
        while time.perf_counter() < end:
            reply = await client.post("/v1/search", body(chance.randrange(USERS) if personalised else None))
            if reply.status != 200:
                raise SystemExit(f"throughput: status {reply.status} {reply.body[:300]!r}")
            done += 1

    await asyncio.gather(*(loop() for _ in range(CONNECTIONS)))
    client.close()
    return done / seconds, (server.processor_seconds() - used) / done * 1e6


async def measure(gateway: Server, size: int, seconds: float, rounds: int) -> dict[str, object]:
    """All numbers."""
    latencies = sorted(await overhead(gateway, 50, seconds))
    row: dict[str, object] = {
        "hardware": hardware(),
        "response_bytes": size,
        "requests": len(latencies),
        "overhead_p50_ms": round(statistics.median(latencies), 3),
        "overhead_p99_ms": round(latencies[int(0.99 * len(latencies))], 3),
    }
    ratios: dict[bool, list[float]] = {False: [], True: []}
    rates: dict[str, list[float]] = {"bare": [], "gateway": [], "gateway_personalised": []}
    processors: dict[str, list[float]] = {name: [] for name in rates}
    with serving([*_SELF, "bare", str(size)], {}, ready="/openapi.json") as bare:
        for _ in range(rounds):
            for personalised in (False, True):
                name = "gateway_personalised" if personalised else "gateway"
                found = {"bare": await throughput(bare, 1.0, personalised)}
                found[name] = await throughput(gateway, 1.0, personalised)
                ratios[personalised].append(found[name][0] / found["bare"][0])
                for app, (rate, processor) in found.items():
                    rates[app].append(rate)
                    processors[app].append(processor)
    for app in rates:
        row[f"{app}_per_s"] = round(statistics.median(rates[app]))
        row[f"{app}_cpu_us"] = round(min(processors[app]))
    row["ratio_bare"] = round(statistics.median(ratios[False]), 3)
    row["ratio_bare_personalised"] = round(statistics.median(ratios[True]), 3)
    return row


_SELF: Sequence[str] = (sys.executable, "-m", "benchmarks.gateway", "--serve")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the gateway around a model that answers at once.")
    parser.add_argument("--seconds", type=float, default=30, help="length of the overhead measurement")
    parser.add_argument("--rounds", type=int, default=7, help="turns of the throughput comparison")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and nothing else")
    parser.add_argument("--serve", nargs=3, metavar=("APP", "ARGUMENT", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        app, argument, port = arguments.serve
        serve_bare(int(argument), int(port)) if app == "bare" else serve_gateway(Path(argument), int(port))
        return
    with tempfile.TemporaryDirectory() as folder, redis() as address:
        settings = {"ONESEARCH_STATE": address}
        with serving([*_SELF, "gateway", folder], settings) as gateway:
            size = uvloop.run(check(gateway))
            report(uvloop.run(measure(gateway, size, arguments.seconds, arguments.rounds)), arguments.json)


if __name__ == "__main__":
    main()
