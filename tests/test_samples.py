"""Training samples: what is asked, what must be written, and what must never be shown."""

from dataclasses import replace

import pytest
from tiny_bundle import tiny_items, write_tiny_identifiers

from onesearch.bundle import SCHEMA_VERSION, Manifest, open_parts
from onesearch.context import SearchContext
from training.samples import MAKERS, MAX_POSITIVES, Sources, search
from training.sessions import PageView

CONTEXT = SearchContext("red shoes", "24-30 F", ("blue bag",), (3, 4), (3, 4, 5))


def view(clicked: tuple[int, ...], ordered: tuple[int, ...] = (), context: SearchContext = CONTEXT) -> PageView:
    return PageView(1, 1, 1, "train", "log", context, clicked, clicked, ordered)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("samples") / "identifiers"
    write_tiny_identifiers(folder)
    bundle = open_parts(folder, Manifest(SCHEMA_VERSION, "", "", "", "", {}, {}, {}))
    catalog = bundle.catalog
    return Sources(
        renderer=bundle.renderer,
        encoder=bundle.encoder,
        keywords=bundle.keywords,
        items=tiny_items(),
        views=[view((1, 2), (2,))],
        item_sids=dict(zip(catalog.item_ids.tolist(), catalog.sids, strict=True)),
        query_sids={"red shoes": bundle.encoder.query_sids(["red shoes"])[0]},
        keyword_share=0.0,
        anonymous_share=0.0,
        seed=1,
    )


def tokens(sources: Sources, sample: object) -> list[str]:
    return [sources.renderer.tokenizer.id_to_token(i) for i in sample.prompt.ids.tolist()]  # type: ignore[attr-defined]


def test_each_click_is_a_sample_and_an_order_counts_twice(sources: Sources) -> None:
    samples = list(search(sources))
    assert [s.weight for s in samples] == [1.0, 2.0]
    for sample, item in zip(samples, (1, 2), strict=True):
        assert sources.renderer.sids.codes(sample.target).tolist() == sources.item_sids[item].tolist()
        assert sample.prompt is samples[0].prompt


def test_at_most_five_positives_and_only_items_of_the_catalog(sources: Sources) -> None:
    assert len(list(search(replace(sources, views=[view(tuple(range(1, 12)))])))) == MAX_POSITIVES
    assert list(search(replace(sources, views=[view((999,))]))) == []
    assert list(search(replace(sources, views=[view(())]))) == []


def test_an_anonymous_page_view_shows_nothing_of_the_user(sources: Sources) -> None:
    known = tokens(sources, next(iter(search(sources))))
    hidden = tokens(sources, next(iter(search(replace(sources, anonymous_share=1.0)))))
    assert {"<field_profile>", "<field_history>", "<field_recent_items>", "<field_recent_queries>"} <= set(known)
    assert [t for t in hidden if t.startswith("<field")] == ["<field_query>", "<field_query_sid>"]


def test_keywords_join_a_share_of_the_page_views(sources: Sources) -> None:
    views = [view((1,))] * 200
    shown = [
        "<field_keywords>" in tokens(sources, s) for s in search(replace(sources, views=views, keyword_share=0.3))
    ]
    assert 30 < sum(shown) < 90


def test_the_prompt_never_holds_the_target_of_its_own_page_view(sources: Sources) -> None:
    context = replace(CONTEXT, recent_items=(), long_items=())
    (sample,) = search(replace(sources, views=[view((17,), context=context)]))
    first = set(sources.renderer.sids.token_ids(sources.query_sids["red shoes"]).tolist())
    sid_tokens = {i for i in sample.prompt.ids.tolist() if i >= sources.renderer.sids.first_id}
    assert sid_tokens == first


@pytest.mark.parametrize("task", MAKERS)
def test_every_task_makes_samples_with_its_tag_and_a_target(sources: Sources, task: str) -> None:
    samples = list(MAKERS[task](sources))
    assert samples
    for sample in samples:
        assert tokens(sources, sample)[0] == f"<task_{task}>"
        assert len(sample.target) > 0
    assert [s.target.tolist() for s in MAKERS[task](sources)] == [s.target.tolist() for s in samples]
