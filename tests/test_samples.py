"""Training samples: what is asked, what must be written, and what must never be shown."""

from dataclasses import replace

import pytest
from tiny_bundle import tiny_items, write_tiny_identifiers

from onesearch.bundle import SCHEMA_VERSION, Manifest, open_parts
from onesearch.context import SearchContext
from onesearch.keywords import KeywordRules
from onesearch.sequence import Prompt
from training.dpo import choice
from training.grpo import page_prompts
from training.page_keywords import Keywords, rule_keywords
from training.pars import Preference
from training.samples import MAKERS, MAX_POSITIVES, Sources, search
from training.sessions import PageView
from training.stages import DpoStage

KEYWORDS = Keywords(query=("shoes", "red"), train=("shoes", "acme"), serve=("umbra",))
CONTEXT = SearchContext("red shoes", "24-30 F", ("blue bag",), (3, 4), (3, 4), (5,))


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
        items=tiny_items(),
        views=[view((1, 2), (2,)), view((), context=SearchContext("blue bag"))],
        keywords=[KEYWORDS, Keywords((), (), ())],
        item_sids=dict(zip(catalog.item_ids.tolist(), catalog.sids, strict=True)),
        query_sids={q: bundle.encoder.query_sids([q])[0] for q in ("red shoes", "blue bag")},
        popularity={},
        trie=bundle.trie,
        judged=None,
        anonymous_share=0.0,
        seed=1,
    )


def with_views(sources: Sources, *views: PageView) -> Sources:
    return replace(sources, views=views, keywords=[KEYWORDS] * len(views))


def tokens(sources: Sources, sample: object) -> list[str]:
    return [sources.renderer.tokenizer.id_to_token(i) for i in sample.prompt.ids.tolist()]  # type: ignore[attr-defined]


def test_each_click_is_a_sample_and_an_order_counts_twice(sources: Sources) -> None:
    samples = list(search(sources))
    assert [s.weight for s in samples] == [1.0, 2.0]
    for sample, item in zip(samples, (1, 2), strict=True):
        assert sources.renderer.sids.codes(sample.target).tolist() == sources.item_sids[item].tolist()
        assert sample.prompt is samples[0].prompt


def test_what_rewards_and_preferences_ask_is_what_the_student_is_asked(sources: Sources) -> None:
    asked = next(search(sources)).prompt.ids.tolist()
    (page,) = page_prompts(sources, 5)  # the other page view has no click
    assert page.prompt.ids.tolist() == asked
    assert page.targets.tolist() == [sources.item_sids[item].tolist() for item in (1, 2)]
    assert page.weights.tolist() == pytest.approx([1 / 3, 2 / 3])  # the second was ordered
    assert page_prompts(sources, 0) == []
    stage = DpoStage("s", 1, exponent=1.0, least_gap=0.1, cap=4.0)
    chosen = choice(sources, stage, Preference(0, (2, 1, 5), (3.0, 2.5, 2.0)))
    assert chosen.prompt.ids.tolist() == asked
    assert chosen.codes.tolist() == [sources.item_sids[item].tolist() for item in (2, 1, 5)]
    assert chosen.weights.tolist() == pytest.approx([1 + 1 / 0.5, 1 + 1 / 1.0])  # the nearer one weighs more


def test_at_most_five_positives_and_only_items_of_the_catalog(sources: Sources) -> None:
    assert len(list(search(with_views(sources, view(tuple(range(1, 12))))))) == MAX_POSITIVES
    assert list(search(with_views(sources, view((999,))))) == []
    assert list(search(with_views(sources, view(())))) == []


def test_an_anonymous_page_view_shows_nothing_of_the_user(sources: Sources) -> None:
    known = tokens(sources, next(iter(search(sources))))
    hidden = tokens(sources, next(iter(search(replace(sources, anonymous_share=1.0)))))
    assert {"<field_profile>", "<field_history>", "<field_recent_items>", "<field_recent_queries>"} <= set(known)
    assert [t for t in hidden if t.startswith("<field")] == ["<field_query>", "<field_query_sid>"]


def shown(sources: Sources, prompt: Prompt) -> str:
    """Text of the keyword field, without separators."""
    ids = prompt.ids.tolist()
    at = [sources.renderer.tokenizer.id_to_token(i) for i in ids].index("<field_keywords>")
    return sources.renderer.text(ids[at + 1 :])


def test_student_teacher_and_serving_inputs_show_none_the_training_and_the_serving_keywords(
    sources: Sources,
) -> None:
    student = next(iter(search(replace(sources, teach=True))))
    assert student.teacher is not None
    assert "<field_keywords>" not in tokens(sources, student)
    assert (
        student.teacher.ids[: len(student.prompt.ids)].tolist() == student.prompt.ids.tolist()
    )  # a shared prefix
    assert "acme" in shown(sources, student.teacher) and "umbra" not in shown(sources, student.teacher)
    taught = next(iter(MAKERS["search_keywords"](sources)))
    assert taught.prompt.ids.tolist() == student.teacher.ids.tolist()
    served = next(iter(MAKERS["search_served"](sources)))
    assert "umbra" in shown(sources, served.prompt) and "acme" not in shown(sources, served.prompt)


def test_the_outcome_of_a_page_view_never_reaches_what_serving_sees(sources: Sources) -> None:
    other = replace(sources, keywords=[replace(k, train=("a", "secret")) for k in sources.keywords])
    for task in ("search", "search_served", "query_to_keywords", "query_sid_to_keyword_sid"):
        for a, b in zip(MAKERS[task](sources), MAKERS[task](other), strict=True):
            assert a.prompt.ids.tolist() == b.prompt.ids.tolist() and a.target.tolist() == b.target.tolist()


def test_a_prompt_that_hides_the_user_shows_keywords_of_the_query_alone(sources: Sources) -> None:
    hidden = next(iter(MAKERS["search_keywords"](replace(sources, anonymous_share=1.0))))
    assert "red" in shown(sources, hidden.prompt) and "acme" not in shown(sources, hidden.prompt)


def test_a_teacher_without_keywords_reads_the_students_prompt(sources: Sources) -> None:
    bare = replace(sources, keywords=[Keywords((), (), ())] * 2, teach=True)
    sample = next(iter(search(bare)))
    assert sample.teacher is not None and sample.teacher.ids.tolist() == sample.prompt.ids.tolist()


def test_keyword_tasks_write_the_list_or_one_keyword_with_an_equal_share(sources: Sources) -> None:
    (listed,) = MAKERS["query_to_keywords"](sources)
    assert sources.renderer.text(listed.target.tolist()) == "shoes, red"
    (personal,) = MAKERS["user_to_keywords"](sources)
    assert sources.renderer.text(personal.target.tolist()) == "shoes, acme"
    for task, keywords in (("query_sid_to_keyword_sid", KEYWORDS.query), ("user_to_keyword_sid", KEYWORDS.train)):
        samples = list(MAKERS[task](sources))
        assert [s.weight for s in samples] == [0.5, 0.5]
        wanted = sources.encoder.query_sids(keywords)
        assert [sources.renderer.sids.codes(s.target).tolist() for s in samples] == wanted.tolist()
        assert "<field_query>" not in tokens(sources, samples[0])  # only the SID of the query


def test_a_window_slides_over_the_clicks_of_one_user(sources: Sources) -> None:
    stranger = replace(view((20, 21)), user_id=2)
    rows = list(MAKERS["items_to_next_item"](with_views(sources, view((1, 2, 3)), stranger, view((4, 5, 6, 7)))))
    vocab = sources.renderer.sids
    seen = [
        (
            vocab.codes(s.prompt.ids[s.prompt.ids >= vocab.first_id].reshape(-1, 5)).tolist(),
            vocab.codes(s.target).tolist(),
        )
        for s in rows
    ]
    assert len(rows) == 7
    for before, item in (((1,), 2), ((2, 3, 4, 5, 6), 7), ((20,), 21)):
        assert ([sources.item_sids[i].tolist() for i in before], sources.item_sids[item].tolist()) in seen


def test_rules_give_the_same_keywords_to_training_and_serving(sources: Sources) -> None:
    provide = rule_keywords(KeywordRules({"red": "Color"}, {"red shoes": ("footwear",)}))
    assert provide(sources.views) == [Keywords(*(("footwear", "red"),) * 3), Keywords((), (), ())]


def test_the_prompt_never_holds_the_target_of_its_own_page_view(sources: Sources) -> None:
    context = replace(CONTEXT, recent_items=(), long_clicks=(), long_orders=())
    (sample,) = search(with_views(sources, view((17,), context=context)))
    first = set(sources.renderer.sids.token_ids(sources.query_sids["red shoes"]).tolist())
    sid_tokens = {i for i in sample.prompt.ids.tolist() if i >= sources.renderer.sids.first_id}
    assert sid_tokens == first


@pytest.mark.parametrize("task", MAKERS)
def test_every_task_makes_samples_with_its_tag_and_a_target(sources: Sources, task: str) -> None:
    samples = list(MAKERS[task](sources))
    assert samples
    for sample in samples:
        assert tokens(sources, sample)[0] == f"<task_{'search' if task.startswith('search') else task}>"
        assert len(sample.target) > 0
    assert [s.target.tolist() for s in MAKERS[task](sources)] == [s.target.tolist() for s in samples]
