"""The log as tables: rows, ids, splits and items against hand-computed ones."""

from collections.abc import AsyncIterator, Iterator

import pytest

from onesearch.catalog import Item
from onesearch.context import profile_text
from onesearch.errors import DataError
from onesearch.live import Change
from service import log_export
from service.events import Event, Exposure
from service.log_export import (
    Log,
    item_rows,
    numbered,
    read_searches,
    recall_rows,
    split_starts,
    user_rows,
)
from service.log_tables import Row

pytestmark = pytest.mark.anyio
T = 1_700_000_000


def exposure(
    request: str, user: str | None, at: float, items: tuple[int, ...], query: str = "red shoes"
) -> Exposure:
    return Exposure(request, "control", {}, "beef", user, query, T + at, items, 12.5)


def event(number: int, kind: str, item: int, user: str, at: float, request: str | None = None) -> Event:
    return Event(f"e{number}", kind, item, user, T + at, request)  # type: ignore[arg-type]


async def read(*entries: Event | Exposure) -> Log:
    async def listed() -> AsyncIterator[Event | Exposure]:
        for entry in entries:
            yield entry

    return await read_searches(listed())


def rows_of(log: Log, *earlier: Row) -> list[Row]:
    sessions = {number: search for number, search in enumerate(log.searches.values(), 1)}
    users = numbered("user ids", [s.user_id for s in log.searches.values() if s.user_id], keep_numbers=True)
    return list(recall_rows(lambda: iter(earlier), sessions, users))


async def test_outcomes_go_to_their_search_in_the_order_of_the_log_and_however_late() -> None:
    log = await read(
        event(0, "click", 9, "7", 0.1, "r1"),  # its exposure was written after it
        exposure("r1", "7", 0.2, (5, 3, 9)),
        exposure("r2", "7", 60.7, (3, 4), "Bag"),
        event(1, "impression", 3, "7", 61, "r2"),
        event(2, "click", 3, "7", 61, "r2"),
        event(3, "click", 3, "7", 62, "r2"),
        event(4, "click", 9, "7", 63),  # only the first search showed it
        event(5, "cart", 3, "7", 64),
        event(6, "order", 3, "7", 30 * 86_400),
        event(7, "order", 5, "8", 30 * 86_400, "r1"),
    )
    first, second = rows_of(log)
    assert first == {
        "user_id": 7,
        "session_id": 1,
        "query": "red shoes",
        "time_index": T,
        "impressed_item_ids": [5, 3, 9],
        "clicked_item_ids": [9, 9],
        "carted_item_ids": [],
        "purchased_item_ids": [5],
        "split": "train",
    }
    assert (second["query"], second["time_index"], second["impressed_item_ids"]) == ("Bag", T + 60, [3, 4])
    outcomes = [second[f"{name}_item_ids"] for name in ("clicked", "carted", "purchased")]
    assert outcomes == [[3, 3], [3], [3]]
    assert log.attributed == {"click": 4, "cart": 1, "order": 2} and log.stray == 0


async def test_events_of_no_search_and_repeated_exposures_are_counted_and_change_nothing() -> None:
    log = await read(
        exposure("r1", "7", 10, (1, 2)),
        exposure("r1", "7", 10, (1, 2)),
        exposure("r1", "8", 20, (3,)),  # a client that uses a request id again
        event(1, "click", 3, "7", 30, "r1"),  # the search did not show it
        event(2, "click", 1, "7", 5),  # before it was shown
        event(3, "order", 1, "9", 30),
        event(4, "impression", 9, "9", 30),
    )
    (row,) = rows_of(log)
    assert (row["user_id"], row["impressed_item_ids"], row["clicked_item_ids"]) == (7, [1, 2], [])
    assert (log.repeated, log.stray, log.attributed) == (2, 3, {"click": 0, "cart": 0, "order": 0})


async def test_nobody_and_nothing_found_are_rows_too() -> None:
    one, other = rows_of(await read(exposure("r1", None, 0, (1,)), exposure("r2", "7", 1, ())))
    assert (one["user_id"], one["impressed_item_ids"]) == (0, [1])
    assert (other["user_id"], other["impressed_item_ids"], other["clicked_item_ids"]) == (7, [], [])


def test_numbers_stay_and_names_get_numbers_that_no_number_is() -> None:
    names = [
        "1",
        "42",
        str(2**62 - 1),
        "0",
        "042",
        "-1",
        "+1",
        "٤٢",
        "1.0",
        "ann",
        str(2**62),
        "9" * 128,
        "\ud800",
    ]
    numbers = numbered("user ids", names, keep_numbers=True)
    assert list(numbers.values())[:3] == [1, 42, 2**62 - 1]
    made = list(numbers.values())[3:]
    assert len(set(made)) == len(made) and all(2**62 <= number < 2**63 for number in made)
    assert numbers == numbered("user ids", reversed(names), keep_numbers=True)
    assert all(number >= 2**62 for number in numbered("request ids", names, keep_numbers=False).values())


def test_the_number_of_a_name_never_changes() -> None:
    """What was exported before has it."""
    import hashlib

    expected = 2**62 + (int(hashlib.blake2b(b"ann", digest_size=8).hexdigest(), 16) >> 2)
    assert numbered("user ids", ["ann"], keep_numbers=True) == {"ann": expected}


def test_two_names_with_one_number_are_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_export, "hashed", lambda name: len(name))
    assert numbered("user ids", ["ann", "ann", "3", "eva4"], keep_numbers=True)["3"] == 3
    with pytest.raises(DataError, match=rf"user ids.*\n.*'ann' and 'bob' share the number {2**62 + 3}"):
        numbered("user ids", ["ann", "bob"], keep_numbers=True)


async def test_splits_are_drawn_by_time_over_earlier_page_views_and_the_logs() -> None:
    log = await read(*(exposure(f"r{i}", "7", 1000 + i, (1,)) for i in range(40)))
    earlier = [
        {"session_id": 1000 + i, "time_index": T + i, "split": "test", "query": "q", "user_id": 3}
        for i in range(60)
    ]
    pseudo = {
        "session_id": 999,
        "time_index": 1,
        "split": "valid",
        "query": "p",
        "user_id": 0,
        "source": "bootstrap",
    }
    rows = rows_of(log, *earlier, pseudo)
    assert rows[60] == pseudo
    rest = sorted((row for row in rows if row != pseudo), key=lambda row: row["time_index"])
    assert [row["split"] for row in rest] == ["train"] * 90 + ["valid"] * 3 + ["test"] * 7
    assert [row | {"split": "test"} for row in rows[:60]] == earlier


def test_page_views_of_one_time_are_in_one_split_and_few_are_all_of_train() -> None:
    assert split_starts([1, 2, 3]) == (float("inf"), float("inf"))
    assert split_starts([5] * 100) == (5, 5)
    assert split_starts(list(range(100))) == (90, 93)
    assert split_starts([]) == (float("inf"), float("inf"))


async def test_a_session_that_is_there_already_is_the_logs_and_no_other_page_view_may_have_its_id() -> None:
    log = await read(exposure("r1", "7", 5, (1,)), event(1, "order", 1, "7", 9e6, "r1"))
    (row,) = rows_of(log)
    assert row["purchased_item_ids"] == [1]
    assert rows_of(log, row | {"purchased_item_ids": [], "split": "test"}) == [row]
    with pytest.raises(DataError, match=rf"session_id: 1 is a page view of time 3, and of {T + 5} in the log"):
        rows_of(log, row | {"time_index": 3})


def test_profiles_join_the_users_that_are_there() -> None:
    earlier = [{"user_id": 1, "gender": "M", "fre_city": "Oslo"}, {"user_id": 2, "age_bucket": "50+"}]
    profiles = {1: profile_text("F", "24-30"), 5: profile_text(None, "0-11"), 6: profile_text("M", None)}
    assert list(user_rows(earlier, profiles)) == [
        {"user_id": 1, "gender": "F", "age_bucket": "24-30", "fre_city": "Oslo"},
        {"user_id": 2, "age_bucket": "50+"},
        {"user_id": 5, "age_bucket": "0-11"},
        {"user_id": 6, "gender": "M"},
    ]


def test_items_are_as_the_service_changed_them() -> None:
    mug = Item(
        2, "Mug", "Clay", ("home", "kitchen"), 9.5, "http://m", False, (("sizes", ["S", "L"]), ("ml", 300)), 77
    )
    changes = {
        2: Change(5, 2, mug),
        3: Change(6, 3, None),
        4: Change(7, 4, None, reset=True),
        9: Change(8, 9, Item(9, "Sofa")),
        10: Change(9, 10, None),
        11: Change(10, 11, None, reset=True),
    }
    earlier: Iterator[Row] = iter(
        [
            {"item_id": 1, "item_title": "Lamp", "attributes": {"colour": "red"}},
            {
                "item_id": 2,
                "item_title": "Cup",
                "brand_id": 4,
                "brand_name": "Oak",
                "seller_id": 8,
                "seller_name": "O",
            },
            {"item_id": 3, "item_title": "Rug"},
            {"item_id": 4, "item_title": "Bag"},
        ]
    )
    assert list(item_rows(earlier, changes)) == [
        {"item_id": 1, "item_title": "Lamp", "attributes": {"colour": "red"}},
        {
            "item_id": 2,
            "item_title": "Mug",
            "in_stock": False,
            "brand_name": "Clay",
            "category_level1_name": "home",
            "category_level2_name": "kitchen",
            "price": 9.5,
            "image_url": "http://m",
            "published_at": 77,
            "attributes": {"sizes": "S, L", "ml": 300},
            "seller_id": 8,
            "seller_name": "O",
        },
        {"item_id": 4, "item_title": "Bag"},
        {"item_id": 9, "item_title": "Sofa", "in_stock": True, "attributes": {}},
    ]
