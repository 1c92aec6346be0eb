"""Normalisation: idempotent, and no text can spell a token."""

from hypothesis import given
from hypothesis import strategies as st

from onesearch.text import normalise


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(st.text())
def test_no_angle_brackets_or_control_characters_remain(text: str) -> None:
    assert not set("<>\n\t\x00") & set(normalise(text))


@given(st.text(st.characters(max_codepoint=127)))
def test_text_of_ascii_alone_is_no_special_case(text: str) -> None:
    assert normalise(text) == normalise(f"{text} \u2003")  # a wide space, which leaves nothing behind


def test_width_case_and_space_are_folded() -> None:
    assert normalise("  ＲＥＤ\tShoes\u00a0<a_1>\n") == "red shoes a_1"
