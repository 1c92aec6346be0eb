"""SID grammar: every form of a SID converts to every other and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onesearch.errors import ConfigError
from onesearch.sid import SidSpec, SidVocab

SIZES = (4096, 1024, 512, 256, 256)


def test_vocabulary_is_the_sum_of_the_codebooks() -> None:
    tokens = SidSpec(SIZES).token_strings()
    assert len(tokens) == len(set(tokens)) == sum(SIZES) == 6144


def test_opq_codes_share_a_family_and_the_second_is_offset() -> None:
    assert SidSpec(SIZES).text([3854, 995, 0, 255, 0]) == "<a_3854><b_995><c_0><d_255><d_256>"


@given(st.tuples(*(st.integers(0, size - 1) for size in SIZES)), st.integers(0, 10**6))
def test_codes_round_trip_through_token_ids(codes: tuple[int, ...], first: int) -> None:
    vocab = SidVocab(SidSpec(SIZES), first)
    assert vocab.codes(vocab.token_ids(codes)).tolist() == list(codes)


def test_prefixes_convert_like_whole_sids() -> None:
    vocab = SidVocab(SidSpec(SIZES), 10)
    whole = vocab.token_ids([[1, 2, 3, 4, 5]])
    assert vocab.token_ids([[1, 2]]).tolist() == whole[:, :2].tolist()
    assert vocab.level_range(1) == (10 + 4096, 10 + 4096 + 1024)


@pytest.mark.parametrize("shift", [-1, 4096])
def test_a_token_of_another_level_is_refused(shift: int) -> None:
    vocab = SidVocab(SidSpec(SIZES), 10)
    ids = vocab.token_ids([[0, 0, 0, 0, 0]])
    ids[0, 0] += shift
    with pytest.raises(ValueError, match=r"at \(0, 0\) is not a SID token of level 0"):
        vocab.codes(ids)


@pytest.mark.parametrize("sizes", [(1, 2, 3), (4, 4, 4, 4, 0), (4, 4, 4, 4, 70000)])
def test_a_wrong_grammar_is_a_config_error(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="sid sizes"):
        SidSpec(sizes)
