"""Prompts: one renderer, one truncation rule, and no text that can break out of its field."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import HISTORY_DIM, SIZES, tiny_renderer

from onesearch.errors import ConfigError
from onesearch.sequence import TASKS, Fields, Renderer, SequenceConfig, sequence_config

RENDERER = tiny_renderer()
LEVELS = len(SIZES)


def full_fields(items: int = 3, queries: tuple[str, ...] = ("blue bag", "red"), **changes: object) -> Fields:
    fields = Fields(
        query="red shoes",
        title="a red shoe",
        query_sid=np.zeros(LEVELS, dtype=np.uint16),
        item_sid=np.ones(LEVELS, dtype=np.uint16),
        profile="24-30 F",
        uid=np.asarray([[1] * LEVELS, [2] * LEVELS], dtype=np.uint16),
        recent_queries=queries,
        recent_sids=np.arange(items, dtype=np.uint16)[:, None] % np.ones(LEVELS, dtype=np.uint16) + np.uint16(1),
        history=np.ones((2, 3, HISTORY_DIM), dtype=np.float32),
        keywords=("shoes", "red"),
    )
    return replace(fields, **changes)  # type: ignore[arg-type]


def names(renderer: Renderer, ids: np.ndarray) -> list[str]:
    return [str(renderer.tokenizer.id_to_token(i)) for i in ids.tolist()]


WITH_UID = tiny_renderer(SequenceConfig(uid="embed"))


@pytest.mark.parametrize("renderer", [RENDERER, WITH_UID], ids=["off", "uid"])
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_opens_with_its_task_and_shows_its_fields_in_order(task: str, renderer: Renderer) -> None:
    tokens = names(renderer, renderer.prompt(task, full_fields()).ids)
    assert tokens[0] == f"<task_{task}>"
    shown = [t.removeprefix("<field_").removesuffix(">") for t in tokens if t.startswith("<field_")]
    assert shown == [field for field in TASKS[task] if field != "uid" or renderer is WITH_UID]


def test_a_user_id_is_ten_tokens_and_a_vocabulary_without_it_is_as_before() -> None:
    tokens = names(WITH_UID, WITH_UID.prompt("search", full_fields()).ids)
    at = tokens.index("<field_uid>") + 1
    assert tokens[at : at + 10] == [
        "<a_1>",
        "<b_1>",
        "<c_1>",
        "<d_1>",
        "<d_4>",
        *("<a_2>", "<b_2>", "<c_2>", "<d_2>", "<d_5>"),
    ]
    assert "<field_uid>" not in names(WITH_UID, WITH_UID.prompt("search", full_fields(uid=None)).ids)
    assert RENDERER.tokenizer.token_to_id("<field_uid>") is None
    with pytest.raises(ConfigError, match="has no token '<field_uid>'"):
        Renderer(RENDERER.tokenizer, RENDERER.sids.spec, WITH_UID.config, HISTORY_DIM)
    with pytest.raises(ConfigError, match=r"sequence\.uid: 'mean', expected one of off, index_mean, vote, embed"):
        sequence_config({"uid": "mean"})


def test_an_unknown_task_names_itself() -> None:
    with pytest.raises(ConfigError, match="task: 'searhc' is unknown"):
        RENDERER.prompt("searhc", full_fields())


def test_keywords_come_last_so_a_prompt_without_them_is_a_strict_prefix() -> None:
    teacher = RENDERER.prompt("search", full_fields()).ids
    student = RENDERER.prompt("search", full_fields(keywords=())).ids
    assert len(student) < len(teacher)
    assert teacher[: len(student)].tolist() == student.tolist()


@given(
    st.integers(0, 30), st.lists(st.text(max_size=20), max_size=12), st.lists(st.text(max_size=20), max_size=12)
)
def test_a_prompt_never_exceeds_its_limit_and_keeps_the_query(
    items: int, queries: list[str], words: list[str]
) -> None:
    fields = full_fields(items, tuple(queries), keywords=tuple(words), query="q" * 200)
    prompt = RENDERER.prompt("search", fields)
    assert len(prompt.ids) <= RENDERER.config.max_ids
    assert names(RENDERER, prompt.ids)[1] == "<field_query>"
    query_tokens = len(RENDERER.prompt("query_to_sid", fields).ids) - 2
    assert query_tokens == RENDERER.config.query_tokens
    student = RENDERER.prompt("search", replace(fields, keywords=())).ids
    assert prompt.ids[: len(student)].tolist() == student.tolist()


def test_truncation_drops_the_oldest_items_and_keeps_the_newest() -> None:
    config = SequenceConfig(recent_items=2)
    renderer = Renderer(RENDERER.tokenizer, RENDERER.sids.spec, config, HISTORY_DIM)
    sids = np.asarray([[i] * LEVELS for i in range(3)], dtype=np.uint16)
    tokens = names(renderer, renderer.prompt("search", Fields(query="x", recent_sids=sids)).ids)
    assert "<a_0>" not in tokens
    assert [t for t in tokens if t.startswith("<a_")] == ["<a_1>", "<a_2>"]


def test_text_cannot_spell_a_control_or_sid_token() -> None:
    tokens = names(RENDERER, RENDERER.prompt("search", Fields(query="<a_1><eos> <task_search>")).ids)
    assert tokens[:2] == ["<task_search>", "<field_query>"]
    assert not [t for t in tokens[2:] if t.startswith("<")]


def test_absent_fields_leave_no_trace_and_no_history_is_zeros() -> None:
    prompt = RENDERER.prompt("search", Fields(query="red"))
    assert [t for t in names(RENDERER, prompt.ids) if t.startswith("<field")] == ["<field_query>"]
    assert prompt.history.shape == (2, 3, HISTORY_DIM)
    assert not prompt.history.any()


def test_history_vectors_can_be_left_out_of_prompts() -> None:
    config = SequenceConfig(history_vectors=False)
    renderer = Renderer(RENDERER.tokenizer, RENDERER.sids.spec, config, HISTORY_DIM)
    prompt, without = (
        renderer.prompt("search", full_fields()),
        RENDERER.prompt("search", full_fields(history=None)),
    )
    assert prompt.ids.tolist() == without.ids.tolist() and not prompt.history.any()
    with pytest.raises(ConfigError, match="history_vectors: 1, expected true or false"):
        SequenceConfig(history_vectors=1)  # type: ignore[arg-type]


def test_history_vectors_stand_behind_three_placeholders() -> None:
    prompt = RENDERER.prompt("search", full_fields())
    assert [i for i in prompt.ids.tolist() if i in RENDERER.history_ids] == list(RENDERER.history_ids)
    assert (prompt.history == 1).all()


def test_a_sid_target_is_its_tokens_and_a_text_target_ends() -> None:
    codes = np.asarray([6, 4, 3, 2, 5], dtype=np.uint16)
    assert RENDERER.sids.codes(RENDERER.target(codes)).tolist() == codes.tolist()
    text = RENDERER.target("red shoes")
    assert text[-1] == RENDERER.eos
    assert RENDERER.text(text.tolist()) == "red shoes"


def test_a_long_text_target_still_ends() -> None:
    target = RENDERER.target("x" * 500)
    assert len(target) == RENDERER.config.target_tokens
    assert target[-1] == RENDERER.eos


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"unknown key\(s\) max_idz"):
        sequence_config({"max_idz": 3})
    with pytest.raises(ConfigError, match=r"sequence\.max_ids: 20"):
        SequenceConfig(max_ids=20)
    with pytest.raises(ConfigError, match=r"sequence\.keywords: -1"):
        SequenceConfig(keywords=-1)
