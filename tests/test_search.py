"""One search end to end on a tiny bundle, against scoring every live SID by brute force."""

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from tiny_bundle import random_contexts, write_tiny_bundle

from onesearch.bundle import Bundle, open_bundle
from onesearch.catalog import Filters, Item
from onesearch.context import SearchContext, assemble
from onesearch.decode import BeamConfig, Score, StepFn
from onesearch.errors import DeadlineError
from onesearch.live import Change
from onesearch.model import TorchDecoder, open_model
from onesearch.runtime import Decoder, Ids, Logits
from onesearch.search import Searcher, SearchOptions
from onesearch.sequence import Prompt
from onesearch.sid import Codes

FILTERS = (
    None,
    Filters(category="Shoes"),
    Filters(brand="acme", price_max=20.0, in_stock=True),
    Filters(exclude_items=tuple(range(1, 29))),
    Filters(category="nothing of the kind"),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path, _ = write_tiny_bundle(tmp_path_factory.mktemp("search"))
    return open_bundle(path)


@pytest.fixture(scope="module")
def searcher(bundle: Bundle) -> Searcher:
    return Searcher(bundle, TorchDecoder(open_model(bundle.path), bundle.renderer))


def brute_force(bundle: Bundle, context: SearchContext, sids: np.ndarray) -> list[tuple[float, int]]:
    """(-score, place) of every SID: log-softmax over each level's whole codebook along it."""
    decoder = TorchDecoder(open_model(bundle.path), bundle.renderer)
    prompt = bundle.renderer.prompt("search", bundle.encoder.fields(context))
    found = []
    for row, sid in enumerate(sids):
        step, score = decoder.start(prompt), 0.0
        for level, code in enumerate(sid):
            logits = step(sid[None, :level], np.zeros(1, dtype=np.int64))[0].astype(float)
            score += logits[code] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        found.append((-score, int(row)))
    return sorted(found)


@pytest.mark.parametrize("filters", FILTERS)
def test_a_page_holds_exactly_the_best_eligible_items(
    bundle: Bundle, searcher: Searcher, filters: Filters | None
) -> None:
    eligible = np.ones(30, dtype=bool) if filters is None else bundle.catalog.eligible(filters)
    for context in random_contexts(4):
        result = searcher.search(context, SearchOptions(limit=12, filters=filters))
        expected = brute_force(bundle, context, bundle.catalog.sids[eligible])
        assert result.eligible == len(expected)
        assert len(result.rows) == min(12, len(expected))
        best = [-key for key, _ in expected[: len(result.rows)]]
        assert result.scores.tolist() == pytest.approx(best, abs=1e-4)
        assert all(eligible[row] for row in result.rows)
        assert len(set(result.rows.tolist())) == len(result.rows)


def test_items_that_changed_while_serving_are_ranked_among_the_others(bundle: Bundle) -> None:
    searcher = Searcher(bundle, TorchDecoder(open_model(bundle.path), bundle.renderer))
    changed = [
        Change(1, 31, Item(31, "teal umbrella", price=3.0)),
        Change(2, 5, None),
        Change(3, 6, Item(6, "pan")),
    ]
    changed.append(Change(4, 7, replace(bundle.catalog.item(bundle.catalog.rows_of([7])[0]), price=99.0)))
    searcher.live.apply(changed)
    sids = bundle.encoder.query_sids(["teal umbrella", "pan"])
    for filters in (None, Filters(price_max=20.0), Filters(exclude_items=(31, 8, 9))):
        for context in random_contexts(3):
            result = searcher.search(context, SearchOptions(limit=200, width=8, filters=filters))
            ids = [result.catalog.item(row).item_id for row in result.rows.tolist()]
            unpriced, costly = {6}, {7, *range(21, 31)}
            gone = {5} | (set() if filters is None else unpriced | costly if filters.price_max else {31, 8, 9})
            assert sorted(ids) == [i for i in range(1, 32) if i not in gone]
            assert result.eligible == len(ids)
            for item_id, sid in zip((31, 6), sids, strict=True):
                if item_id in ids:
                    row = result.rows[ids.index(item_id)]
                    assert result.catalog.sid(row).tolist() == sid.tolist()
                    score = -brute_force(bundle, context, sid[None])[0][0]
                    assert result.scores[ids.index(item_id)] == pytest.approx(score, abs=1e-4)
    known = searcher.search(SearchContext("bag", recent_items=(31,)), SearchOptions(limit=5))
    assert known.scores.tolist() != searcher.search(SearchContext("bag"), SearchOptions(limit=5)).scores.tolist()


def test_a_search_asks_the_last_level_in_quarters_of_the_beam(bundle: Bundle) -> None:
    decoder, asked = TorchDecoder(open_model(bundle.path), bundle.renderer), []

    class Counting:
        def start(self, prompt: Prompt) -> StepFn:
            step = decoder.start(prompt)

            def counted(codes: Codes, parents: Ids, /) -> Logits:
                asked.append(codes.shape)
                return step(codes, parents)

            return counted

    searcher = Searcher(bundle, Counting())
    page = searcher.search(SearchContext("blue bag"), SearchOptions(limit=2, width=16))
    last = [rows for rows, level in asked if level == 4]
    assert last and set(last) == {4} and sum(last) < 16
    searcher.search(SearchContext("blue bag"), SearchOptions(limit=16, width=16))  # it could not stop early
    assert asked[-1] == (16, 4)
    prompt, _ = searcher.render(SearchContext("blue bag"))
    whole = searcher.decode(prompt, BeamConfig(16, 2))
    assert asked[-1] == (16, 4)
    np.testing.assert_allclose(page.scores, whole.scores, atol=1e-5)


@pytest.mark.parametrize("score", ["level", "legal"])
def test_limits_beyond_the_catalog_return_every_item_once(searcher: Searcher, score: Score) -> None:
    result = searcher.search(SearchContext("red shoes"), SearchOptions(limit=200, width=512, score=score))
    assert sorted(result.rows.tolist()) == list(range(30))
    assert all(a >= b for a, b in pairwise(result.scores.tolist()))


@pytest.mark.parametrize(
    "query", ["a red mug", "shoes", "red umbrella", "the umbrella", "mug not red", "nothing known"]
)
@pytest.mark.parametrize("filters", [None, Filters(in_stock=True), Filters(category="mug", exclude_items=(20,))])
def test_items_with_the_querys_words_come_first_and_the_best_others_follow(
    bundle: Bundle, query: str, filters: Filters | None
) -> None:
    searcher = Searcher(bundle, TorchDecoder(open_model(bundle.path), bundle.renderer))
    searcher.live.apply([Change(1, 31, Item(31, "teal umbrella", price=3.0)), Change(2, 3, None)])
    context = SearchContext(query)
    plain = searcher.search(context, SearchOptions(limit=200, filters=filters))
    scored = dict(zip(plain.rows.tolist(), plain.scores.tolist(), strict=True))
    said = set(query.removesuffix("not red").split()) - {"a", "the"}
    hits = {row: len(said.intersection(plain.catalog.item(row).text().split())) for row in scored}
    first = [row for row, hit in hits.items() if hit == max(hits.values()) > 0]
    expected = first + [row for row in scored if row not in first]
    for limit in (1, 4, 200):
        page = searcher.search(context, SearchOptions(limit=limit, filters=filters, match=True, facets=limit == 4))
        assert page.matched == min(limit, len(first))
        assert page.eligible == len(expected)
        assert [scored[row] for row in page.rows.tolist()] == pytest.approx(
            [scored[row] for row in expected[:limit]], abs=1e-5
        )
        assert set(page.rows[: page.matched].tolist()) <= set(first)
        assert len(set(page.rows.tolist())) == len(page.rows) == min(limit, len(expected))
        assert page.scores.tolist() == pytest.approx([scored[row] for row in page.rows.tolist()], abs=1e-5)


def test_keywords_are_matched_only_when_asked(searcher: Searcher) -> None:
    context = SearchContext("red shoes by acme")
    assert searcher.search(context, SearchOptions(limit=1)).keywords == ()
    assert "shoes" in searcher.search(context, SearchOptions(limit=1, keywords=True)).keywords


def test_history_changes_the_answer(searcher: Searcher) -> None:
    bare = searcher.search(SearchContext("red shoes"), SearchOptions(limit=30))
    known = searcher.search(
        SearchContext("red shoes", recent_items=(20, 21), long_clicks=(20, 21)), SearchOptions(limit=30)
    )
    assert bare.scores.tolist() != known.scores.tolist()


def test_a_repeated_query_is_not_its_own_history() -> None:
    context = assemble(" Red shoes", ["bag", "BAG ", "red  shoes", "red shoes"], list(range(200)), list(range(30)))
    assert context.query == "red shoes"
    assert context.recent_queries == ("bag",)
    assert context.recent_items == tuple(range(180, 200))
    assert context.long_clicks == tuple(range(100, 200))
    assert context.long_orders == tuple(range(30))


def test_a_search_whose_time_is_up_starts_no_further_level(bundle: Bundle) -> None:
    class Slow:
        """Takes the whole time of the request on its second level."""

        def __init__(self, inner: Decoder) -> None:
            self.inner, self.levels = inner, 0

        def start(self, prompt: Prompt) -> StepFn:
            step = self.inner.start(prompt)

            def slow(codes: np.ndarray, parents: np.ndarray, /) -> np.ndarray:
                self.levels += 1
                time.sleep(0.6 if self.levels == 2 else 0)
                return step(codes, parents)

            return slow

    slow = Slow(TorchDecoder(open_model(bundle.path), bundle.renderer))
    context, late = SearchContext("red shoes"), SearchOptions(deadline=time.monotonic() + 0.5)
    with pytest.raises(DeadlineError):
        Searcher(bundle, slow).search(context, late)
    assert slow.levels == 2
    assert late == SearchOptions()  # an answer does not depend on when it is wanted
    slow.levels = 0
    with pytest.raises(DeadlineError):
        Searcher(bundle, slow).search(context, SearchOptions(deadline=time.monotonic()))
    assert slow.levels == 0
