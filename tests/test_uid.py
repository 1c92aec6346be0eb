"""User ids by hand, and the default history of users who have none: one rule, no look at the outcome."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sessions import row, tables
from tiny_bundle import tiny_items, write_tiny_identifiers

from onesearch.bundle import Bundle, Manifest, contract_digest, open_parts
from onesearch.context import SearchContext, default_sequence
from onesearch.errors import BundleError
from onesearch.quantizer import Codebooks
from onesearch.sequence import SequenceConfig, UidMode
from onesearch.uid import index_mean, recency, user_id, vote
from training.cold_start import default_table, with_defaults
from training.page_keywords import Keywords
from training.samples import Sources, search
from training.sessions import page_views

MODES: tuple[UidMode, ...] = ("index_mean", "vote", "embed")
SIZES = (7, 5, 4, 3, 6)
E1, E2 = math.exp(1), math.exp(math.sqrt(2))  # λ of two items, before they are divided by their sum
UNSEALED = Manifest(1, "", "", "", "", {}, {}, {})


def codes(*rows: tuple[int, ...]) -> np.ndarray:
    return np.asarray(rows, dtype=np.uint16).reshape(-1, 5)


def small_codebooks() -> Codebooks:
    """Centroids on whole numbers: RQ level l is the axis l, OPQ adds nothing."""
    rq = tuple(np.zeros((3, 4), dtype=np.float32) for _ in range(3))
    for level, centroids in enumerate(rq):
        centroids[:, level] = [0, 1, 2]
    opq = (np.zeros((1, 2), dtype=np.float32),) * 2
    return Codebooks(rq, np.eye(4, dtype=np.float32), opq)


def test_weights_grow_towards_the_present_and_sum_to_one() -> None:
    assert recency(1).tolist() == [1.0]
    assert recency(2) == pytest.approx([E1 / (E1 + E2), E2 / (E1 + E2)])
    assert recency(100).sum() == pytest.approx(1) and (np.diff(recency(100)) > 0).all()


def test_the_published_form_rounds_the_weighted_mean_of_code_numbers_up() -> None:
    # weights of two items are 0.398 and 0.602: (0, 6) → 3.6, (4, 4) → 4, (3, 0) → 1.19, (2, 2) → 2, (5, 0) → 1.99
    assert index_mean(codes((0, 4, 3, 2, 5), (6, 4, 0, 2, 0)), SIZES).tolist() == [4, 4, 2, 2, 2]
    assert index_mean(codes((6, 4, 3, 2, 5)), SIZES).tolist() == [6, 4, 3, 2, 5]


def test_a_vote_is_taken_level_by_level_among_those_who_agree() -> None:
    assert vote(codes((0, 1, 1, 1, 1), (0, 2, 2, 2, 2))).tolist() == [0, 2, 2, 2, 2]
    # e^√i is 2.7, 4.1, 5.7. Level 1: code 1 has 6.8, code 0 has 5.7. Level 2 under it: code 3 has 2.7, code 0 has 4.1,
    # although over all three items code 3 has 8.4.
    assert vote(codes((1, 3, 0, 0, 0), (1, 0, 1, 1, 1), (0, 3, 2, 2, 2))).tolist() == [1, 0, 1, 1, 1]


@given(st.lists(st.tuples(*(st.integers(0, size - 1) for size in SIZES)), min_size=1, max_size=30))
def test_a_vote_is_always_one_of_the_items_and_a_mean_stays_in_the_codebook(rows: list[tuple[int, ...]]) -> None:
    assert tuple(vote(codes(*rows)).tolist()) in rows
    assert (index_mean(codes(*rows), SIZES) < SIZES).all()


def test_embed_encodes_the_weighted_mean_of_what_the_codes_stand_for() -> None:
    books = small_codebooks()
    # axis 0: 0.398·0 + 0.602·2 = 1.2 → code 1; axis 1: 0.6 → 1; axis 2: 0.8 → 1
    found = user_id(codes((0, 0, 2, 0, 0), (2, 1, 0, 0, 0)), codes((1, 2, 0, 0, 0)), "embed", books)
    assert found is not None and found.tolist() == [[1, 1, 1, 0, 0], [1, 2, 0, 0, 0]]


@pytest.mark.parametrize("mode", MODES)
def test_one_history_stands_in_for_the_other_and_without_any_there_is_no_id(mode: UidMode) -> None:
    books, one = small_codebooks(), codes((1, 2, 0, 0, 0))
    for short, long in ((one, one[:0]), (one[:0], one), (one, one)):
        found = user_id(short, long, mode, books)
        assert found is not None and found.tolist() == [[1, 2, 0, 0, 0]] * 2
    assert user_id(one[:0], one[:0], mode, books) is None
    assert user_id(one, one, "off", books) is None


def opened(folder: Path, mode: UidMode = "off", defaults: Mapping[str, tuple[int, ...]] | None = None) -> Bundle:
    write_tiny_identifiers(folder, SequenceConfig(uid=mode), defaults or {})
    return open_parts(folder, UNSEALED)


@pytest.mark.parametrize("mode", MODES)
def test_a_bundle_keeps_its_mode_and_prompts_show_the_id(mode: UidMode, tmp_path: Path) -> None:
    bundle = opened(tmp_path / "parts", mode)
    fields = bundle.encoder.fields(
        SearchContext("red shoes", recent_items=(1, 2), long_clicks=(3, 1), long_orders=(2,))
    )
    assert fields.uid is not None and fields.uid.shape == (2, 5)
    sids = bundle.catalog.sids_of
    assert fields.uid.tolist() == user_id(sids((1, 2)), sids((3, 1, 2)), mode, bundle.encoder.codebooks).tolist()  # type: ignore[union-attr]
    ids = bundle.renderer.prompt("search", fields).ids.tolist()
    at = ids.index(bundle.renderer.tokenizer.token_to_id("<field_uid>"))
    assert (
        ids[at + 1 : at + 11] == np.concatenate([bundle.renderer.sids.token_ids(c) for c in fields.uid]).tolist()
    )
    assert bundle.encoder.fields(SearchContext("red shoes")).uid is None


def test_the_default_is_the_most_clicked_last_and_equals_by_item_id() -> None:
    assert default_sequence(Counter({5: 1, 3: 2, 9: 2, 4: 1})) == (5, 4, 9, 3)
    assert len(default_sequence(Counter(range(50)))) == 10
    assert default_sequence(Counter()) == ()


def test_users_without_history_get_that_of_their_query(tmp_path: Path) -> None:
    bundle = opened(tmp_path / "parts", "vote", {"red shoes": (4, 2)})
    found = bundle.encoder.fields(SearchContext("Red  shoes"))
    same = bundle.encoder.fields(SearchContext("red shoes", recent_items=(4, 2), long_clicks=(4, 2)))
    assert found.recent_sids.tolist() == same.recent_sids.tolist() == bundle.catalog.sids_of((4, 2)).tolist()
    assert found.uid is not None and found.uid.tolist() == same.uid.tolist()  # type: ignore[union-attr]
    assert found.history is not None and found.history.tolist() == same.history.tolist()  # type: ignore[union-attr]
    for known in (SearchContext("red shoes", recent_items=(9,)), SearchContext("red shoes", long_orders=(9,))):
        assert 4 not in known.recent_items
        assert (
            bundle.encoder.fields(known).recent_sids.tolist()
            == bundle.catalog.sids_of(known.recent_items).tolist()
        )
    assert bundle.encoder.fields(SearchContext("another")).history is None
    assert bundle.encoder.fields(SearchContext("red shoes", default_items=())).history is None


def test_defaults_are_part_of_the_contract_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    opened(plain)
    opened(other, "off", {"red shoes": (4, 2)})
    assert contract_digest(plain) != contract_digest(other)
    (other / "defaults.json").write_bytes(b"[1]")
    with pytest.raises(BundleError, match="not a table of default histories"):
        open_parts(other, UNSEALED)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["a", "b"]), st.integers(1, 5)), max_size=14))
def test_a_training_page_view_sees_the_table_of_what_was_strictly_before_it(
    events: list[tuple[int, str, int]],
) -> None:
    if not events:
        return
    views = page_views(tables([row(0, time, query, [item]) for time, query, item in events]))
    for view in with_defaults(views):
        before = [other for other in views if other.time < view.time]
        assert view.context.default_items == default_table(before).get(view.context.query, ())


def test_a_hidden_user_is_rendered_as_serving_renders_a_stranger(tmp_path: Path) -> None:
    bundle = opened(tmp_path / "parts", "embed", {"red shoes": (4, 2)})
    log = tables([row(0, 1, "red shoes", [4, 2]), row(0, 2, "red shoes", [2]), row(1, 3, "red shoes", [7])])
    views = with_defaults(page_views(log))
    assert [view.context.default_items for view in views] == [(), (4, 2), (4, 2)]
    catalog = bundle.catalog
    sources = Sources(
        bundle.renderer,
        bundle.encoder,
        tiny_items(),
        views[2:],
        [Keywords(("shoes",), ("t",), ("s",))],
        dict(zip(catalog.item_ids.tolist(), catalog.sids, strict=True)),
        {"red shoes": bundle.encoder.query_sids(["red shoes"])[0]},
        popularity={},
        trie=bundle.trie,
        judged=None,
        anonymous_share=1.0,
        seed=1,
        teach=True,
    )
    (sample,) = search(sources)
    stranger = bundle.encoder.fields(SearchContext("red shoes"))
    served = bundle.renderer.prompt("search", stranger)
    assert sample.prompt.ids.tolist() == served.ids.tolist()
    assert sample.prompt.history.tolist() == served.history.tolist()
    taught = bundle.renderer.prompt("search", replace(stranger, keywords=("shoes",)))
    assert sample.teacher is not None and sample.teacher.ids.tolist() == taught.ids.tolist()
