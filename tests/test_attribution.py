"""Which search an event belongs to: hand-made cases, and a search through everything as the oracle."""

import random
from dataclasses import dataclass

from service.attribution import attribute
from service.events import Event


@dataclass(frozen=True)
class Search:
    request_id: str
    user_id: str | None
    at: float
    items: tuple[int, ...]


def event(number: int, user: str, item: int, at: float, request: str | None = None) -> Event:
    return Event(f"e{number}", "click", item, user, at, request)


def found(searches: list[Search], events: list[Event], within: float = float("inf")) -> list[str | None]:
    pairs = list(attribute({search.request_id: search for search in searches}, events, within))
    assert [event for event, _ in pairs] == events
    return [search and search.request_id for _, search in pairs]


def test_an_event_belongs_to_the_search_it_names_else_to_the_last_that_showed_the_item_before() -> None:
    searches = [
        Search("r2", "ann", 20.0, (1, 2)),
        Search("r1", "ann", 10.0, (1, 3)),
        Search("r3", "bob", 30.0, (1,)),
        Search("r4", None, 40.0, (1,)),
    ]
    for events, expected in {
        event(1, "ann", 1, 25.0, "r1"): "r1",  # named, though a later search showed it as well
        event(2, "bob", 9, 5.0, "r4"): "r4",  # named by whoever, whenever and whatever it showed
        event(3, "ann", 1, 25.0): "r2",
        event(4, "ann", 1, 20.0): "r2",  # shown at that moment
        event(5, "ann", 1, 19.9): "r1",
        event(6, "ann", 3, 99.0): "r1",  # the last search did not show it
        event(7, "ann", 1, 9.9): None,
        event(8, "ann", 9, 99.0): None,
        event(9, "eve", 1, 99.0): None,
        event(10, "ann", 1, 25.0, "gone"): "r2",
    }.items():
        assert found(searches, [events]) == [expected], events


def test_only_events_that_name_no_search_can_be_too_late() -> None:
    searches = [Search("r1", "ann", 10.0, (1,))]
    events = [event(1, "ann", 1, 15.0), event(2, "ann", 1, 15.1), event(3, "ann", 1, 1e9, "r1")]
    assert found(searches, events, within=5.0) == ["r1", None, "r1"]


def test_a_search_through_everything_finds_the_same() -> None:
    chance = random.Random(0)
    users = ["ann", "bob", None]
    searches = [
        Search(f"r{i}", chance.choice(users), float(chance.randrange(50)), tuple(chance.sample(range(8), 3)))
        for i in range(60)
    ]
    events = [
        event(i, chance.choice(["ann", "bob", "eve"]), chance.randrange(9), float(chance.randrange(60)), named)
        for i in range(300)
        for named in [f"r{chance.randrange(80)}" if chance.random() < 0.3 else None]
    ]
    for search, happened in zip(found(searches, events, within=20.0), events, strict=True):
        named = [s for s in searches if s.request_id == happened.request_id]
        could = [
            s
            for s in searches
            if s.user_id == happened.user_id and happened.item_id in s.items and 0 <= happened.at - s.at <= 20.0
        ]
        newest = [s.request_id for s in could if s.at == max(s.at for s in could)]
        assert search in ([named[0].request_id] if named else newest or [None])
