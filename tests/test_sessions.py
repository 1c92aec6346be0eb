"""Page views: history holds only what happened strictly before (spec §2.2, §10.1 item 8)."""

import math

import polars as pl
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundle import tiny_items

from training.columns import SCHEMAS, frame_schema
from training.sessions import click_rates, page_views
from training.tables import Tables


def tables(rows: list[dict[str, object]]) -> Tables:
    defaults = {c.name: c.default for c in SCHEMAS["recall"] if isinstance(c.default, (str, list))}
    whole = [{**defaults, "session_id": i, **row} for i, row in enumerate(rows)]
    users = {c.name: c.default for c in SCHEMAS["users"]} | {"user_id": 1, "gender": "F", "age_bucket": "24-30"}
    return Tables(
        tiny_items(),
        users=pl.DataFrame([users], schema=frame_schema("users")),
        recall=pl.DataFrame(whole, schema=frame_schema("recall")),
    )


def row(
    user: int, time: int, query: str, clicked: list[int], bought: list[int] | None = None
) -> dict[str, object]:
    shown = sorted({*clicked, *(bought or []), 30})
    return {
        "user_id": user,
        "time_index": time,
        "query": query,
        "impressed_item_ids": shown,
        "clicked_item_ids": clicked,
        "purchased_item_ids": bought or [],
    }


def test_history_is_cut_at_the_page_views_own_time() -> None:
    views = page_views(
        tables(
            [
                row(1, 20, "C", [3]),
                row(1, 10, "a", [1]),
                row(1, 20, "d", [4], [4]),
                row(1, 10, "B", [2], [2]),
                row(2, 5, "z", [9]),
            ]
        )
    )
    by_query = {view.context.query: view for view in views}
    assert by_query["a"].context.recent_items == by_query["b"].context.recent_items == ()
    assert by_query["c"].context.recent_items == by_query["d"].context.recent_items == (1, 2)
    assert by_query["c"].context.long_clicks == by_query["d"].context.long_clicks == (1, 2)
    assert by_query["a"].context.long_orders == by_query["b"].context.long_orders == ()
    assert by_query["c"].context.long_orders == by_query["d"].context.long_orders == (2,)
    assert by_query["c"].context.recent_queries == ("a", "b")
    assert by_query["a"].context.profile == "24-30 F"
    assert by_query["z"].context.profile == ""


def test_a_purchase_counts_as_a_click_once() -> None:
    (view,) = page_views(tables([row(1, 1, "a", [2, 1], [1, 5])]))
    assert view.clicked == (2, 1, 5)
    assert view.ordered == (1, 5)


def test_bootstrapped_queries_have_no_history() -> None:
    views = page_views(tables([row(0, 1, "a", [1]), row(0, 2, "b", [2])]))
    assert views[1].context.recent_items == ()


@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(0, 5), st.integers(1, 29), st.booleans()), min_size=1, max_size=12
    )
)
def test_changing_an_outcome_never_changes_its_own_context(events: list[tuple[int, int, int, bool]]) -> None:
    def views(shift: int) -> list[tuple[int, object]]:
        rows = []
        for i, (user, time, item, bought) in enumerate(events):
            clicked = [item if i else (item + shift) % 29 + 1]
            rows.append(row(user, time, f"q{i}", clicked, clicked if bought else []))
        return [(v.time, v.context) for v in page_views(tables(rows))]

    first_time = events[0][1]
    before = [context for time, context in views(0) if time <= first_time]
    after = [context for time, context in views(11) if time <= first_time]
    assert before == after


def test_click_rates_are_log_smoothed() -> None:
    views = page_views(tables([row(1, 1, "a", [1]), row(1, 2, "a", [1])]))
    rates = click_rates(views)

    assert rates[1] == math.log(12) / math.log(12)
    assert rates[30] == math.log(10) / math.log(12)
    assert 2 not in rates
