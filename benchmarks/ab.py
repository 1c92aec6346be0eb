"""A/B reports on simulated traffic: with a planted effect, and with none.

`python -m benchmarks.ab [--users 20000] [--lift 0.03] [--plot DIR] [--json]`: users search, click and order; every
exposure and event goes through the durable log of a real store, and `onesearch-ab report` reads it back. The split is
the service's.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path

import numpy as np
import orjson

from onesearch.hardware import hardware
from service import ab
from service.events import Event, Exposure
from service.store import Store, sqlite_store
from service.variants import VariantOptions, WeightedSplit

VARIANTS = ("control", "treatment")
_BATCH, _DAY = 2_000, 86_400.0


async def fill(store: Store, users: int, lift: float, seed: int) -> None:
    """Searches of one day; `lift` raises the click rate under the treatment."""
    rng = np.random.default_rng(seed)
    split = WeightedSplit({name: VariantOptions(bundle="shop") for name in VARIANTS})
    taste = rng.beta(2.4, 4.8, users)
    exposures: list[Exposure] = []
    events: list[Event] = []
    for user in range(users):
        key = f"user-{seed}-{user}"
        variant = split.assign(key).variant
        rate = min(1.0, taste[user] * (1 + lift * (variant == "treatment")))
        for number in range(1 + rng.poisson(4)):
            at, items = float(rng.random() * _DAY), tuple(int(i) for i in rng.integers(0, 10_000, 10))
            request = f"{key}-{number}"
            latency = float(40 + rng.gamma(2, 5))
            exposures.append(Exposure(request, variant, {}, key, key, "shoes", at, items, latency))
            if rng.random() < rate:
                events.append(Event(f"{request}-c", "click", items[0], key, at + 1, request))
                if rng.random() < 0.12:
                    price = float(np.round(rng.lognormal(3.5, 0.6), 2))
                    events.append(Event(f"{request}-o", "order", items[0], key, at + 60, request, price=price))
    for start in range(0, len(exposures), _BATCH):
        await store.events.expose(exposures[start : start + _BATCH])
    for start in range(0, len(events), _BATCH):
        await store.events.record(events[start : start + _BATCH])


def main() -> None:
    """Console entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--lift", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="folder for the plots")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, lift in (("planted", arguments.lift), ("none", 0.0)):
            path = Path(folder) / f"{name}.sqlite3"
            asyncio.run(_fill(path, arguments.users, lift, arguments.seed))
            about = {"click_rate_effect": lift, "users": arguments.users, "hardware": hardware()}
            text = f"effect on the click rate: {lift:+.1%}; {arguments.users} users"
            print(orjson.dumps(about).decode() if arguments.json else text, flush=True)
            plot = arguments.plot / f"ab_{name}.png" if arguments.plot else None
            ab.report(f"sqlite:{path}", "control", None, None, None, None, None, as_json=arguments.json, plot=plot)


async def _fill(path: Path, users: int, lift: float, seed: int) -> None:
    store = sqlite_store(path, 100 * _DAY, 100 * _DAY)
    await fill(store, users, lift, seed)
    await store.close()


if __name__ == "__main__":
    main()
