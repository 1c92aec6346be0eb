"""From a user's items to prompt fields: behaviours apart, vectors by hand, the order of clicks and orders."""

from collections.abc import Sequence

import numpy as np
import pytest
from test_uid import codes, small_codebooks

from onesearch.context import MAX_LONG_ITEMS, ContextEncoder, SearchContext, assemble
from onesearch.sequence import UidMode
from onesearch.sid import Codes

SIDS = {1: (1, 2, 0, 0, 0), 2: (2, 2, 1, 0, 0), 3: (0, 1, 2, 0, 0), 4: (1, 1, 1, 0, 0)}
QUERY_SID = codes((0, 0, 0, 0, 0))[0]


class Shelf:
    """Four items; others do not exist."""

    def sids_of(self, item_ids: Sequence[int]) -> Codes:
        return codes(*(SIDS[item] for item in item_ids if item in SIDS))


def encoder(uid: UidMode = "off") -> ContextEncoder:
    books = small_codebooks()
    for level, centroids in enumerate(books.rq):
        centroids[:, 3] = (
            level + 1
        )  # so that directions differ: centroid c of level l is c on axis l and l + 1 on axis 3
    return ContextEncoder(None, books, Shelf(), uid)  # type: ignore[arg-type]


def vectors(context: SearchContext) -> np.ndarray | None:
    return encoder().fields(context, QUERY_SID).history


def unit(*values: float) -> np.ndarray:
    return np.asarray(values) / np.linalg.norm(values)


def test_each_behaviour_has_the_normalised_mean_centroid_of_each_level() -> None:
    found = vectors(SearchContext("q", long_clicks=(1, 2), long_orders=(3,)))
    assert found is not None and found.shape == (2, 3, 4) and found.dtype == np.float32
    clicks = [unit(1.5, 0, 0, 1), unit(0, 2, 0, 2), unit(0, 0, 0.5, 3)]
    orders = [unit(0, 0, 0, 1), unit(0, 1, 0, 2), unit(0, 0, 2, 3)]
    np.testing.assert_allclose(found, [clicks, orders], atol=1e-6)


@pytest.mark.parametrize("absent", [(), (99,)])
def test_a_behaviour_without_items_is_zero_and_without_any_there_are_no_vectors(absent: tuple[int, ...]) -> None:
    clicked = vectors(SearchContext("q", long_clicks=(1,), long_orders=absent))
    ordered = vectors(SearchContext("q", long_clicks=absent, long_orders=(1,)))
    assert clicked is not None and ordered is not None
    assert clicked[0].any() and not clicked[1].any()
    assert clicked.tolist() == ordered[::-1].tolist()
    assert vectors(SearchContext("q", long_clicks=absent, long_orders=absent)) is None
    assert vectors(SearchContext("q", recent_items=(1,))) is None


def test_only_the_last_items_of_a_behaviour_count() -> None:
    many = (3, *(1,) * MAX_LONG_ITEMS)
    some = SearchContext("q", long_clicks=(1,), long_orders=(1,))
    assert vectors(SearchContext("q", long_clicks=many, long_orders=many)).tolist() == vectors(some).tolist()  # type: ignore[union-attr]


def test_the_orders_of_a_user_stand_nearest_to_the_present() -> None:
    context = SearchContext("q", recent_items=(2,), long_clicks=(2,), long_orders=(3,))
    found = encoder("vote").fields(context, QUERY_SID).uid  # λ of an order is 0.6, of the click before it 0.4
    assert found is not None and found.tolist() == [list(SIDS[2]), list(SIDS[3])]


@pytest.mark.parametrize(
    "known",
    [
        SearchContext("q", profile="24-30 F"),
        SearchContext("q", recent_queries=("p",)),
        SearchContext("q", recent_items=(1,)),
        SearchContext("q", long_clicks=(1,)),
        SearchContext("q", long_orders=(1,)),
    ],
)
def test_anything_known_makes_a_known_user(known: SearchContext) -> None:
    assert known.knows_user and not SearchContext("q", keywords=("k",)).knows_user


def test_clicks_and_orders_are_cut_each_by_itself() -> None:
    context = assemble("q", [], list(range(150)), list(range(1000, 1030)))
    assert context.recent_items == tuple(range(130, 150))
    assert context.long_clicks == tuple(range(50, 150))
    assert context.long_orders == tuple(range(1000, 1030))
