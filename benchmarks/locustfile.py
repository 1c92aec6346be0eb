"""Shoppers for Locust: `locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000`.

Open loop: each Locust user is a stream of searches with Poisson arrivals, `--arrivals` a second (default 1), that
never waits for answers; 30 users are 30 searches/s. Response times count from when a search was meant to be sent,
so a slow service cannot hide behind a generator that waits for it.
"""

import random
import time
from argparse import ArgumentParser
from typing import Any

import gevent  # type: ignore[import-untyped]
from locust import FastHttpUser, events, task

from benchmarks.traffic import EVENTS, SEARCH, Traffic, vocabulary

_words: tuple[list[str], list[str]] = ([], [])


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--arrivals", type=float, default=1.0, help="searches per second and user")


class Shoppers(FastHttpUser):
    """A stream of searches and clicks."""

    concurrency = 1000

    def on_start(self) -> None:
        """Learn the vocabulary once."""
        if not _words[0]:
            for known, found in zip(_words, vocabulary(self._page), strict=True):
                known[:] = found
        seed = random.randrange(2**32)
        self._traffic, self._chance = Traffic(*_words, seed), random.Random(seed)

    @task
    def arrivals(self) -> None:
        """Searches arrive until the test ends."""
        due = time.perf_counter()
        while True:
            due += self._chance.expovariate(self.environment.parsed_options.arrivals)
            gevent.sleep(max(0.0, due - time.perf_counter()))
            gevent.spawn(self._shop, due)

    def _shop(self, due: float) -> None:
        ask = self._traffic.search()
        with self.client.post(SEARCH, json=ask.body, headers=dict(ask.headers), catch_response=True) as answer:
            answer.request_meta["response_time"] = (time.perf_counter() - due) * 1e3
            body: dict[str, Any] | None = answer.json() if answer.status_code == 200 else None
        click = self._traffic.click(ask, body) if body else None
        if click:
            self.client.post(EVENTS, json=click)

    def _page(self, path: str) -> bytes:
        return bytes(self.client.get(path, name="vocabulary").content)
