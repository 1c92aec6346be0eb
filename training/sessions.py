"""From the recall table to page views with the history each user had strictly before them (spec §2.2).

Histories are cut at the page view's own time: two page views of a user at the same time do not see each other.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from onesearch.context import KEPT_ITEMS, KEPT_QUERIES, SearchContext, assemble, profile_text
from training.columns import UNKNOWN
from training.tables import Tables


@dataclass(frozen=True)
class PageView:
    """One search with its outcome. clicked and ordered are item ids; a purchase without a click counts as both."""

    session_id: int
    user_id: int
    time: int
    split: str
    source: str
    context: SearchContext
    impressed: tuple[int, ...]
    clicked: tuple[int, ...]
    ordered: tuple[int, ...]


@dataclass
class _History:
    """What a user did so far, oldest first, bounded, as the service records it."""

    queries: list[str] = field(default_factory=list)
    clicks: list[int] = field(default_factory=list)
    orders: list[int] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        clicked, ordered = row["clicked_item_ids"], row["purchased_item_ids"]
        self.queries = [*self.queries, row["query"]][-KEPT_QUERIES:]
        self.clicks = [*self.clicks, *clicked][-KEPT_ITEMS:]
        self.orders = [*self.orders, *ordered][-KEPT_ITEMS:]


def page_views(tables: Tables) -> list[PageView]:
    """All page views in time order. A user id of 0 (bootstrapped queries) has no history."""
    if tables.recall is None:
        return []
    profiles = _profiles(tables.users)
    histories: dict[int, _History] = defaultdict(_History)
    views: list[PageView] = []
    for moment in _moments(tables.recall):
        views += [_page_view(row, profiles, histories) for row in moment]
        for row in moment:
            if row["user_id"]:
                histories[row["user_id"]].add(row)
    return views


def click_rates(views: Sequence[PageView]) -> dict[int, float]:
    """Log-smoothed click rate per item over the given page views: log(clicks + 10) / log(impressions + 10).

    The calibration of spec §4.9 without its order term; items never shown get no entry.
    """
    shown: Counter[int] = Counter()
    clicked: Counter[int] = Counter()
    for view in views:
        shown.update(view.impressed)
        clicked.update(view.clicked)
    return {item: math.log(clicked[item] + 10) / math.log(count + 10) for item, count in shown.items()}


def _moments(recall: pl.DataFrame) -> Iterator[list[dict[str, Any]]]:
    """Rows grouped by time, times ascending."""
    rows: list[dict[str, Any]] = []
    for row in recall.sort("time_index", "session_id").iter_rows(named=True):
        if rows and rows[0]["time_index"] != row["time_index"]:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _page_view(row: dict[str, Any], profiles: dict[int, str], histories: dict[int, _History]) -> PageView:
    user = int(row["user_id"])
    past = histories[user] if user else _History()
    ordered = tuple(row["purchased_item_ids"])
    clicked = tuple(dict.fromkeys((*row["clicked_item_ids"], *ordered)))
    context = assemble(row["query"], past.queries, past.clicks, past.orders, profiles.get(user, ""))
    return PageView(
        session_id=int(row["session_id"]),
        user_id=user,
        time=int(row["time_index"]),
        split=row["split"],
        source=row["source"],
        context=context,
        impressed=tuple(row["impressed_item_ids"]),
        clicked=clicked,
        ordered=ordered,
    )


def _profiles(users: pl.DataFrame | None) -> dict[int, str]:
    if users is None:
        return {}
    columns = users.select("user_id", "gender", "age_bucket").iter_rows()
    return {
        user: profile_text(None if gender == UNKNOWN else gender, None if age == UNKNOWN else age)
        for user, gender, age in columns
    }
