"""Keyword rules: whole words, longest leftmost first, no overlaps, any script; and how they are mined from a log."""

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sessions import row, tables
from tiny_bundle import tiny_items

from onesearch.errors import BundleError
from onesearch.keywords import MAX_KEYWORDS, KeywordRules, load_keywords
from onesearch.text import WORD
from training.keywords import associated, mine_keywords
from training.sessions import page_views

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
    {"wine glass": ("crystal", "stemmed")},
)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("paper shredder", ()),
        ("RED shoes", ("red",)),
        ("red wine glass", ("red wine", "glass")),
        ("a wine glass, red", ("wine glass", "red", "crystal", "stemmed")),
        ("红色跑鞋男", ("跑鞋",)),
        ("blue t-shirt", ("t-shirt",)),
        ("Hotel  Essentials", ("slippers", "towels")),
        ("不锈钢保温水杯大容量", ("不锈钢保温水杯",)),
        ("red-wine", ("red",)),
        ("t-shirt, not red", ("t-shirt",)),
        ("wine glass without crystal", ("wine glass", "stemmed")),
        ("跑鞋 不要保温", ("跑鞋",)),
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


def test_rules_from_before_categories_had_words_are_read(tmp_path: Path) -> None:
    (tmp_path / "k.json").write_bytes(b'{"types": {"red": "Color"}, "seeds": {"q": ["red"]}}')
    assert load_keywords(tmp_path / "k.json") == KeywordRules({"red": "Color"}, {"q": ("red",)})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"types": {"a": "Colour"}, "seeds": {}}',
        b'{"types": 1, "seeds": 2}',
        b'{"types": {}, "words": {"a": 1}}',
    ],
)
def test_a_damaged_file_is_a_bundle_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k.json").write_bytes(content)
    with pytest.raises(BundleError):
        load_keywords(tmp_path / "k.json")


def test_strength_is_the_count_times_pointwise_mutual_information() -> None:
    """By hand, q is 8 of 16 events. b: 6 ln(6·16 / (8·7)) = 3.23, a: 2 ln 2 = 1.39, c: 8 ln(8·16 / (8·15)) = 0.52,
    e: 4 ln 1 = 0 goes, d was seen once. By count c would lead, by mutual information alone a."""
    groups = [
        ("q", "abc", 2),
        ("q", "bce", 4),
        ("q", "cd", 1),
        ("q", "c", 1),
        ("r", "bce", 1),
        ("r", "ce", 3),
        ("r", "c", 3),
        ("r", "", 1),
    ]
    assert associated(groups, least=2)["q"] == ("b", "a", "c")


def test_seeds_are_what_goes_with_the_clicks_of_training() -> None:
    """Of 10 clicks, 5 each for gift and party: lamp 5 ln 2, umbra 4 ln 1.6, acme once; the other way round for rugs."""
    log = [row(1, i, "gift", [item]) for i, item in enumerate([11, 11, 13, 13, 12])]
    log += [row(1, i, "party", [item]) for i, item in enumerate([26, 26, 28, 28, 27])]
    rules = mine_keywords(tiny_items(), page_views(tables(log)), min_items=2)
    assert rules.seeds == {"gift": ("lamp", "umbra"), "party": ("rug", "acme")}
    assert rules.match("gift") == ("lamp", "umbra")
    later = [row(2, 10 + i, "gift", [26]) | {"split": "test"} for i in range(50)]
    assert mine_keywords(tiny_items(), page_views(tables(log + later)), min_items=2) == rules
    assert mine_keywords(tiny_items(), page_views(tables(log[1:])), min_items=2).seeds.keys() == {"party"}


def test_a_category_brings_the_attributes_of_its_items() -> None:
    """10 clicks on the red lamp: red is 11 of a lamp's 15 counts and 16 of all 40, 11 ln(11·40 / (15·16)) > 0."""
    colours = [f'{{"colour": "{title.split()[0]}"}}' for title in tiny_items()["item_title"]]
    items = tiny_items().with_columns(pl.Series("attributes", colours))
    views = page_views(tables([row(1, i, f"query {i}", [11]) for i in range(10)]))
    rules = mine_keywords(items, views, min_items=2)
    assert rules.words == {"lamp": ("red",)}
    assert rules.match("a lamp for the desk") == ("lamp", "red")
    assert rules.match("a red lamp") == ("red", "lamp")
