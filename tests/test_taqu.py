"""What keywords must satisfy, whoever made them: hand-checked answers in two languages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onesearch.errors import ProviderError
from onesearch.negation import negated
from onesearch.taqu import MAX_CHARS, MAX_HAN, keywords_of, valid


@pytest.mark.parametrize(
    ("query", "excluded"),
    [
        ("lamp but not red", {"red"}),
        ("knitwear without a turtleneck", {"turtleneck"}),
        ("sugar-free snacks", {"sugar"}),
        ("anything but wool scarf", {"wool"}),
        ("毛衣 不要高领", {"高领"}),
        ("除了黑色的裙子", {"黑色"}),
        ("notebook for work", set()),
        ("nonstick pan", set()),
        ("knot tying rope", set()),
    ],
)
def test_negations_are_found(query: str, excluded: set[str]) -> None:
    assert negated(query) == excluded


@pytest.mark.parametrize(
    ("answer", "query", "kept"),
    [
        ("red shoes, blue bag", "x", ("red shoes", "blue bag")),
        ("1. Red Shoes\n2. RED shoes\n- blue bag.", "x", ("red shoes", "blue bag")),
        ("碎花裙，雪纺裙、长裙；碎花裙", "裙子", ("碎花裙", "雪纺裙", "长裙")),
        ("a b c d e f, fine", "x", ("fine",)),
        ("这是一个超过十个汉字的关键词, 短裙", "x", ("短裙",)),
        ("包邮连衣裙, 正品, 连衣裙", "x", ("连衣裙",)),
        ("red lamp, desk lamp, infrared lamp", "lamp not red", ("desk lamp", "infrared lamp")),
        ("高领毛衣, 圆领毛衣", "毛衣 不要高领", ("圆领毛衣",)),
        ("sugar free gum, sugar candy", "sugar-free sweets", ("sugar free gum",)),
        ("Not extractable", "x", ()),
        ("无法提取。", "x", ()),
        ('"quoted words"', "x", ("quoted words",)),
    ],
)
def test_answers_become_keywords(answer: str, query: str, kept: tuple[str, ...]) -> None:
    assert keywords_of(answer, query, 8) == kept


@pytest.mark.parametrize(
    "answer", ["!!!", "free shipping", "the keywords you asked for are listed in the text below"]
)
def test_an_answer_without_a_usable_keyword_is_an_error(answer: str) -> None:
    with pytest.raises(ProviderError):
        keywords_of(answer, "x", 8)


@given(st.lists(st.text(max_size=50), max_size=20), st.text(max_size=40), st.integers(1, 8))
def test_valid_keywords_keep_the_contract(keywords: list[str], query: str, limit: int) -> None:
    kept = valid(keywords, query, limit)
    assert len(kept) <= limit
    assert len(set(kept)) == len(kept)
    assert all(0 < len(keyword) <= max(MAX_CHARS, MAX_HAN) for keyword in kept)
    assert valid(kept, query, limit) == kept
