"""The word index against sets of words, on any texts, and damaged arrays that are reported."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onesearch.text import STOP_WORDS, content_words, words
from onesearch.word_index import WordIndex

WORDS = ("red", "Étoile", "红", "鞋", "zx-81", "3", "mug", "")


@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join), max_size=12))
def test_rows_and_counts_are_those_of_sets_of_words(texts: list[str]) -> None:
    index = WordIndex.of(texts)
    asked = ["red", "étoile", "红", "鞋", "zx", "81", "3", "mug", "absent"]
    held = [set(words(text)) for text in texts]
    for word in asked:
        assert index.rows(word).tolist() == [row for row, found in enumerate(held) if word in found]
    assert index.counts(asked, len(texts)).tolist() == [len(found.intersection(asked)) for found in held]
    assert index.faults(len(texts)) == []


def test_damaged_arrays_are_reported() -> None:
    index = WordIndex.of(["red mug", "red"])
    assert index.words.dtype == np.uint64 and index.word_rows.dtype == np.uint32
    with_fault = {
        "does not divide": replace(index, word_starts=index.word_starts[:-1]),
        "does not divide word_rows": replace(index, word_rows=index.word_rows[:-1]),
        "beyond the 2": replace(index, word_rows=index.word_rows + 2),
        "not ascending": replace(index, word_starts=np.asarray([0, 9, 3])),
        "words.npy, word_starts.npy": replace(index, words=index.words[::-1]),
        "words.npy: is float64": replace(index, words=index.words.astype(float)),
        "word_starts.npy: is int64 (1, 3)": replace(index, word_starts=index.word_starts[None]),
    }
    for message, damaged in with_fault.items():
        (fault,) = damaged.faults(2)
        assert message in fault


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("Case for the iPhone, case", ("case", "iphone")),
        ("the who", ("who",)),
        ("of the", ("of", "the")),
        ("", ()),
    ],
)
def test_content_words_are_distinct_and_never_only_left_out(query: str, expected: tuple[str, ...]) -> None:
    assert content_words(query) == expected
    assert all(word == word.lower() for word in STOP_WORDS)
