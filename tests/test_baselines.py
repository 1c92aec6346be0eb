import math
from collections import Counter

import numpy as np
import pytest

from onesearch.text import words
from training.baselines import Bm25, CategoryPopularity, item_text
from training.metrics import top_rows

TEXTS = ["red shoes", "red red running shoes for men", "blue bag", "red bag", "red bag"]


def test_words_are_normalised_and_scripts_without_spaces_split_by_character():
    assert words("Red-SHOES, ½ №42") == ["red", "shoes", "1", "2", "no42"]
    assert words("红色 shoes") == ["红", "色", "shoes"]
    assert words("  !? ") == []


def test_item_text_uses_the_named_attributes_or_all_and_leaves_truth_values_out():
    body = {"title": "Lamp", "attributes": {"colour": "red", "watts": 40, "dimmable": True, "description": "warm"}}
    assert item_text(body) == "Lamp red 40 warm"
    assert item_text(body, ("description",)).split() == ["Lamp", "warm"]
    assert item_text(body, ("missing",)).split() == ["Lamp"]


def bm25_score(query: str, text: str) -> float:
    """BM25 as Lucene scores it, constant factor left out."""
    length = sum(len(words(t)) for t in TEXTS) / len(TEXTS)
    total = 0.0
    for word in words(query):
        frequency = words(text).count(word)
        having = sum(word in words(t) for t in TEXTS)
        idf = math.log(1 + (len(TEXTS) - having + 0.5) / (having + 0.5))
        total += idf * frequency / (frequency + 1.5 * (0.25 + 0.75 * len(words(text)) / length))
    return total


@pytest.mark.parametrize("query", ["red shoes", "bag", "blue running bag", "men red red"])
def test_bm25_ranks_as_the_formula_says_with_ties_by_row(query):
    scores = [bm25_score(query, text) for text in TEXTS]
    expected = sorted((i for i in range(len(TEXTS)) if scores[i] > 0), key=lambda i: (-round(scores[i], 6), i))
    assert Bm25(TEXTS).top(query, 10).tolist() == expected


def test_bm25_ranks_only_items_that_share_a_word():
    assert Bm25(TEXTS).top("blue", 10).tolist() == [2]
    assert Bm25(TEXTS).top("red", 2).tolist() == [0, 3]
    assert Bm25(TEXTS).top("unheard of", 10).tolist() == []
    assert Bm25(TEXTS).top("", 10).tolist() == []


def test_scores_at_rows_are_those_that_the_ranking_goes_by() -> None:
    index = Bm25(TEXTS)
    for query in ("red bag", "blue", "unheard of red", ""):
        rows = np.arange(len(TEXTS))
        scores = index.scores_at(query, rows)
        best = top_rows(scores, len(TEXTS))
        assert index.top(query, 10).tolist() == best[scores[best] > 0].tolist()
        assert np.array_equal(index.scores_at(query, rows[::-2]), scores[::-2])


def test_bm25_finds_items_better_than_chance():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in rng.integers(0, 300, 8)) for _ in range(200)]
    index = Bm25(texts)
    found = [target in index.top(" ".join(texts[target].split()[:2]), 10) for target in range(200)]
    assert np.mean(found) > 0.9 > 10 / 200


CATEGORIES = ["shoes", "shoes", "bags", "bags", "bags"]
CLICKED = {"red": Counter({0: 1, 3: 1, 4: 1}), "trainers": Counter({1: 5}), "blue": Counter()}


def test_popularity_follows_the_category_clicked_most_for_the_query():
    ranked = CategoryPopularity(CATEGORIES, CLICKED, Bm25(TEXTS))
    assert ranked.category("RED ") == "bags"
    assert ranked.top("red", 10).tolist() == [3, 4, 2]
    assert ranked.top("trainers", 10).tolist() == [1, 0]
    assert ranked.top("trainers", 1).tolist() == [1]


def test_popularity_falls_back_to_the_first_bm25_result_then_to_the_whole_catalog():
    ranked = CategoryPopularity(CATEGORIES, CLICKED, Bm25(TEXTS))
    assert ranked.top("running", 10).tolist() == [1, 0]
    assert ranked.top("blue", 10).tolist() == [3, 4, 2]  # searched for in training, never with a click
    assert ranked.top("unheard of", 3).tolist() == [1, 0, 3]


def test_popularity_breaks_a_tie_of_categories_by_name():
    tied = {"red": Counter({0: 1, 2: 1})}
    assert CategoryPopularity(CATEGORIES, tied, Bm25(TEXTS)).category("red") == "bags"


def test_popularity_works_without_any_logs():
    assert CategoryPopularity(CATEGORIES, {}, Bm25(TEXTS)).top("blue", 10).tolist() == [2, 3, 4]
