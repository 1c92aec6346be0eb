"""Keyword rules: whole words, longest leftmost first, no overlaps; any script."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onesearch.errors import BundleError
from onesearch.keywords import MAX_KEYWORDS, KeywordRules, load_keywords
from onesearch.text import WORD

RULES = KeywordRules(
    {
        "red": "Color",
        "red wine": "Entity",
        "wine glass": "Entity",
        "glass": "Material",
        "跑鞋": "Entity",
        "t-shirt": "Entity",
        "不锈钢保温水杯": "Entity",
        "保温": "Function",
    },
    {"hotel essentials": ("slippers", "towels")},
)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("paper shredder", ()),
        ("RED shoes", ("red",)),
        ("red wine glass", ("red wine", "glass")),
        ("a wine glass, red", ("wine glass", "red")),
        ("红色跑鞋男", ("跑鞋",)),
        ("blue t-shirt", ("t-shirt",)),
        ("Hotel  Essentials", ("slippers", "towels")),
        ("不锈钢保温水杯大容量", ("不锈钢保温水杯",)),
        ("red-wine", ("red",)),
        ("", ()),
        ("?!", ()),
    ],
)
def test_matches(query: str, expected: tuple[str, ...]) -> None:
    assert RULES.match(query) == expected


@given(st.lists(st.sampled_from(["red", "wine", "glass", "x", "shredder", "跑", "鞋"]), max_size=12))
def test_spans_are_ordered_disjoint_and_spell_their_phrase(words: list[str]) -> None:
    text = " ".join(words)
    spans = RULES.spans(text)
    end = 0
    for phrase, (start, stop) in spans:
        assert start >= end
        assert text[start:stop] == phrase
        end = stop


@given(st.lists(st.sampled_from(["red", "wine", "glass", "x", "shredder", "跑", "鞋", "跑鞋"]), max_size=10))
def test_spans_equal_the_definition(words: list[str]) -> None:
    """Leftmost, then longest, among all phrases that start and end at a word: found by trying every span."""
    text = " ".join(words)
    bounds = [m.span() for m in WORD.finditer(text)]
    at, expected = 0, []
    for start, _ in bounds:
        stops = [e for _, e in bounds if e > start and text[start:e] in RULES.types]
        if start >= at and stops:
            at = max(stops)
            expected.append((text[start:at], (start, at)))
    assert RULES.spans(text) == expected


def test_at_most_eight_keywords() -> None:
    rules = KeywordRules({f"w{i}": "Entity" for i in range(20)})
    assert len(rules.match(" ".join(f"w{i}" for i in range(20)))) == MAX_KEYWORDS


def test_rules_survive_the_file(tmp_path: Path) -> None:
    RULES.save(tmp_path / "k.json")
    assert load_keywords(tmp_path / "k.json") == RULES


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"types": {"a": "Colour"}, "seeds": {}}', b'{"types": 1, "seeds": 2}']
)
def test_a_damaged_file_is_a_bundle_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k.json").write_bytes(content)
    with pytest.raises(BundleError):
        load_keywords(tmp_path / "k.json")
