"""From the durable log to the tables that training reads (spec §2.1, §4.13); `training.columns` is their contract.

One answered search is one row of recall: what was shown, in rank order; clicks, carts and orders as they were
received, repeated ones too, because the user's histories have them so. Searches without results are rows as well:
their queries are history.

Ids: a user whose id is a number from 1 to 2^62 - 1 in plain digits keeps it, so that searches join what the shop's own
tables say of the user. Any other user id, and every request id as session id, becomes 2^62 plus 62 bits of its BLAKE2b
hash, always the same; two names that share a number are an error. A search of nobody that is known has user 0, who has
no history.

Times are whole Unix seconds, the unit of `published_at` and of the windows of `training.stream`. Two searches that a
user made within one second do not see each other in training's histories, though serving saw the first. And the tables
do not say when a click came: the next search's history holds all clicks of the one before.
"""

import hashlib
import math
import sys
from array import array
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from onesearch.catalog import Item
from onesearch.context import AgeBucket, Gender
from onesearch.errors import DataError
from onesearch.live import Change
from service.attribution import attribute
from service.events import Event, Exposure
from service.log_tables import Row

VALID_SHARE, TEST_SHARE = 0.03, 0.07  # of the page views, as in the simulated marketplace; test are the last ones
NOBODY = 0
_NAMED = 2**62  # numbers made of names start here
_COLUMNS = {"click": "clicked_item_ids", "cart": "carted_item_ids", "order": "purchased_item_ids"}


@dataclass(slots=True)
class Search:
    """One answered search: its user (None: not known), when in Unix seconds, the items shown, and the items of what the
    user then did, by type of event, where there is any. Items take 8 bytes each."""

    user_id: str | None
    query: str
    at: float
    items: "array[int]"
    outcomes: "dict[str, array[int]] | None" = None


@dataclass
class Log:
    """The searches of a log by request id. repeated: exposures whose request id was there already, which are left out.

    attributed: events that are part of a search, by type; stray: those that belong to none, or to one that did not show
    the item. Impressions are neither: what was shown is known.
    """

    searches: dict[str, Search] = field(default_factory=dict)
    repeated: int = 0
    attributed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COLUMNS, 0))
    stray: int = 0


async def read_searches(entries: AsyncIterator[Event | Exposure]) -> Log:
    """The searches of a log with what came of them, however late. Raises StateUnavailable.

    Entries stream by; held are the searches, and the events that are no impressions.
    """
    log, events = Log(), list[Event]()
    async for entry in entries:
        if isinstance(entry, Event):
            if entry.type in _COLUMNS:
                events.append(entry)
        elif entry.request_id in log.searches:
            log.repeated += 1
        else:
            user = None if entry.user_id is None else sys.intern(entry.user_id)
            shown = array("q", entry.items)
            log.searches[entry.request_id] = Search(user, sys.intern(entry.query), entry.at, shown)
    for event, search in attribute(log.searches, events):
        if search is None or event.item_id not in search.items:
            log.stray += 1
            continue
        search.outcomes = search.outcomes or {}
        search.outcomes.setdefault(event.type, array("q")).append(event.item_id)
        log.attributed[event.type] += 1
    return log


def numbered(kind: str, names: Iterable[str], keep_numbers: bool) -> dict[str, int]:
    """Names and their numbers, 1 to 2^63 - 1; keep_numbers: one that is a number already keeps it.

    Raises DataError that says of which kind two names share a number.
    """
    numbers: dict[str, int] = {}
    owners: dict[int, str] = {}
    for name in names:
        if keep_numbers and _is_number(name):
            numbers[name] = int(name)
            continue
        number = numbers[name] = _NAMED + hashed(name)
        if (other := owners.setdefault(number, name)) != name:
            raise DataError(kind, [f"{other!r} and {name!r} share the number {number}, expected one name of each"])
    return numbers


def hashed(name: str) -> int:
    """62 bits of a name."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 2


def _is_number(name: str) -> bool:
    plain = name.isascii() and name.isdecimal() and name[0] != "0" and len(name) <= len(str(_NAMED))
    return plain and int(name) < _NAMED


def recall_rows(
    earlier: Callable[[], Iterator[Row]], sessions: Mapping[int, Search], users: Mapping[str, int]
) -> Iterator[Row]:
    """The rows of an earlier recall table, then those of searches by session id; users: numbers of user ids.

    A session that is in both is taken from the log, which may know later orders. All page views are split anew by time:
    the last TEST_SHARE are test, VALID_SHARE before them valid; pseudo-queries keep their split. `earlier` is read
    twice and never held. Raises DataError when a session id names two page views.
    """
    times = array("q", (int(search.at) for search in sessions.values()))
    for row in earlier():
        search = sessions.get(row["session_id"])
        if search is None:
            if _is_logged(row):
                times.append(row["time_index"])
        elif row["time_index"] != int(search.at):
            here, logged = row["time_index"], int(search.at)
            fault = f"session_id: {row['session_id']} is a page view of time {here}, and of {logged} in the log"
            raise DataError("recall", [f"{fault}; expected one of each id"])
    starts = split_starts(sorted(times))
    for row in earlier():
        if row["session_id"] not in sessions:
            yield row | {"split": _split(row["time_index"], starts)} if _is_logged(row) else row
    for session, search in sessions.items():
        outcomes = search.outcomes or {}
        yield {
            "user_id": NOBODY if search.user_id is None else users[search.user_id],
            "session_id": session,
            "query": search.query,
            "time_index": int(search.at),
            "impressed_item_ids": search.items.tolist(),
            **{column: outcomes[kind].tolist() if kind in outcomes else [] for kind, column in _COLUMNS.items()},
            "split": _split(int(search.at), starts),
        }


def split_starts(times: Sequence[int]) -> tuple[float, float]:
    """When valid and when test begin among the times of all page views, which are in order; never, if the share comes
    to less than one of them."""
    places = (len(times) - round(len(times) * share) for share in (VALID_SHARE + TEST_SHARE, TEST_SHARE))
    valid, test = (times[place] if place < len(times) else math.inf for place in places)
    return valid, test


def _is_logged(row: Row) -> bool:
    return row.get("source") in (None, "log")


def _split(time: int, starts: tuple[float, float]) -> str:
    return ("train", "valid", "test")[bisect_right(starts, time)]


def user_rows(earlier: Iterable[Row], profiles: Mapping[int, str]) -> Iterator[Row]:
    """The rows of an earlier users table, with what profiles (user → text of prompts) say in its place, then the users
    that are new."""
    fresh = dict(profiles)
    for row in earlier:
        yield row | _profile(fresh.pop(row["user_id"], ""))
    for user, profile in fresh.items():
        yield {"user_id": user} | _profile(profile)


def _profile(text: str) -> Row:
    """What a text of `onesearch.context.profile_text` says."""
    known = {"gender": get_args(Gender), "age_bucket": get_args(AgeBucket)}
    return {column: part for part in text.split() for column, values in known.items() if part in values}


def item_rows(earlier: Iterable[Row], changes: Mapping[int, Change]) -> Iterator[Row]:
    """The rows of an earlier items table as the last changes by item id left them, then the items that are new.

    A changed item is what the service says of it; its seller, of which the service knows nothing, stays. An item that a
    rollback put back is what the table says.
    """
    fresh = {item_id: change for item_id, change in changes.items() if not change.reset}
    for row in earlier:
        change = fresh.pop(row["item_id"], None)
        if change is None:
            yield row
        elif change.item is not None:
            seller = {name: row[name] for name in ("seller_id", "seller_name") if name in row}
            yield _item(change.item) | seller
    yield from (_item(change.item) for change in fresh.values() if change.item is not None)


def _item(item: Item) -> Row:
    """The row that `training.package.catalog_items` reads as this item; a list of values becomes one text."""
    row: Row = {"item_id": item.item_id, "item_title": item.title, "in_stock": item.in_stock}
    row |= {"brand_name": item.brand} if item.brand else {}
    row |= {f"category_level{level}_name": name for level, name in enumerate(item.category, 1)}
    row |= {name: value for name in ("price", "image_url") if (value := getattr(item, name)) is not None}
    row |= {"published_at": item.published_at} if item.published_at else {}
    attributes = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in item.attributes
    }
    return row | {"attributes": attributes}
