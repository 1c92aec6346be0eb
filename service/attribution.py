"""Which search an event belongs to: the one rule, for A/B reports and for the tables that training reads."""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from service.events import Event


class Shown(Protocol):
    """An answered search: whose it was (None: nobody's that is known), when in Unix seconds, and the items shown."""

    @property
    def user_id(self) -> str | None: ...
    @property
    def at(self) -> float: ...
    @property
    def items(self) -> Sequence[int]: ...


S = TypeVar("S", bound=Shown)


def attribute(
    searches: Mapping[str, S], events: Sequence[Event], within: float = math.inf
) -> Iterator[tuple[Event, S | None]]:
    """Every event, in the given order, with the search it belongs to; None if there is none.

    searches: by request id. An event belongs to the search it names, whenever either was logged. If it names none, or
    one that is not there, it belongs to its user's last search that showed the item, of those up to `within` seconds
    before. Takes time in proportion to what is given.
    """
    loose = [event for event in events if event.request_id is None or event.request_id not in searches]
    shown = _shown(searches, {(event.user_id, event.item_id) for event in loose})
    for event in events:
        search = None if event.request_id is None else searches.get(event.request_id)
        if search is None:
            earlier = shown.get((event.user_id, event.item_id), [])
            place = bisect_right(earlier, event.at, key=lambda search: search.at)
            if place and event.at - earlier[place - 1].at <= within:
                search = earlier[place - 1]
        yield event, search


def _shown(searches: Mapping[str, S], pairs: set[tuple[str, int]]) -> dict[tuple[str, int], list[S]]:
    """For pairs of user and item the user's searches that showed the item, in time order."""
    users = {user for user, _ in pairs}
    found: dict[tuple[str, int], list[S]] = defaultdict(list)
    for search in sorted((s for s in searches.values() if s.user_id in users), key=lambda search: search.at):
        for item in search.items:
            if search.user_id is not None and (search.user_id, item) in pairs:
                found[search.user_id, item].append(search)
    return found
