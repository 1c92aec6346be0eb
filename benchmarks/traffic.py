"""The shoppers of the load tests: what they ask, and what they click. Shared by Locust and `benchmarks.load`.

Queries follow Zipf's law; seven of ten searches belong to a known user's session, some have filters, some force a
variant; one answer in three gets a click on one of its first items, mostly the first.
"""

import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

SEARCH, EVENTS = "/v1/search", "/v1/events"
USERS, KNOWN, FILTERED, FORCED, CLICKED = 2000, 0.7, 0.2, 0.1, 0.33
ZIPF = 1.0
_SESSION = 8
_CATEGORIES, _WORDS = 40, 4


@dataclass(frozen=True)
class Ask:
    """One search: its body and headers."""

    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


class Traffic:
    """An endless, seeded stream of searches and the clicks that follow them."""

    def __init__(self, queries: Sequence[str], variants: Sequence[str], seed: int) -> None:
        self._queries, self._variants, self._chance = queries, variants, random.Random(seed)
        self._weights = list(itertools.accumulate(1 / rank**ZIPF for rank in range(1, len(queries) + 1)))
        self._session: list[str] = []

    def search(self) -> Ask:
        """The next search."""
        chance = self._chance
        body: dict[str, Any] = {"query": chance.choices(self._queries, cum_weights=self._weights)[0]}
        if chance.random() < KNOWN:
            body["user_id"] = self._user()
        if chance.random() < FILTERED:
            body["filters"] = chance.choice([{"in_stock": True}, {"price_max": 100}, {"price_min": 20}])
        if chance.random() < FORCED:
            return Ask(body, {"X-OneSearch-Variant": chance.choice(self._variants)})
        return Ask(body)

    def click(self, ask: Ask, answer: Mapping[str, Any]) -> dict[str, Any] | None:
        """The body of the click on an answer, None if nobody clicks."""
        items = answer["items"]
        if "user_id" not in ask.body or not items or self._chance.random() >= CLICKED:
            return None
        place = min(int(self._chance.expovariate(0.5)), len(items) - 1)
        return {
            "type": "click",
            "item_id": items[place]["item_id"],
            "user_id": ask.body["user_id"],
            "request_id": answer["request_id"],
        }

    def _user(self) -> str:
        """Users come in sessions: a few of them are about at any time, each for several searches."""
        if len(self._session) < _SESSION or self._chance.random() < 0.2:
            self._session = [*self._session[1 - _SESSION :], f"load-{self._chance.randrange(USERS)}"]
        return self._chance.choice(self._session)


def vocabulary(get: Callable[[str], bytes]) -> tuple[list[str], list[str]]:
    """Queries, most frequent first, and variants, learnt from the service itself; get: path to body.

    The bundle's own examples come first, then its categories and the first words of their items.
    """
    catalog = json.loads(get("/v1/catalog"))
    categories = catalog["categories"][:_CATEGORIES]
    titles = []
    for category in categories:
        found = json.loads(get(f"{SEARCH}?q={quote(category)}&limit=50"))
        titles += [" ".join(item["title"].split()[:_WORDS]) for item in found["items"]]
    random.Random(0).shuffle(titles)
    variants = [variant["name"] for variant in json.loads(get("/v1/variants"))["variants"]]
    return list(dict.fromkeys([*catalog["examples"], *categories, *titles])), variants
