"""The one text normalisation, used before embedding, keyword matching, caching and tokenising."""

import re
import unicodedata

MAX_QUERY_CHARS = 256
_BLANKS = dict.fromkeys([*range(32), 127, *b"<>"], " ")

# A word is a run of letters and digits, or one character of a script written without spaces.
WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿가-힯]|[^\W_぀-ヿ㐀-䶿一-鿿가-힯]+")

STOP_WORDS = frozenset(
    ("a", "an", "and", "by", "for", "from", "in", "no", "not", "of", "on", "or", "the", "to", "with", "without")
)


def normalise(text: str) -> str:
    """NFKC, casefold, `<`/`>` and control characters to spaces, white space collapsed.

    Angle brackets go because SID tokens are spelled `<a_0>`: text a user typed can never become a SID token.
    """
    if text.isascii():  # the same by a shorter way
        return " ".join(text.translate(_BLANKS).lower().split())
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = [" " if c in "<>" or unicodedata.category(c)[0] == "C" else c for c in folded]
    return " ".join("".join(kept).split())


def words(text: str) -> list[str]:
    """Words of normalised text: no stemming, no stop words."""
    return WORD.findall(normalise(text))


def content_words(text: str) -> tuple[str, ...]:
    """The distinct words of a text in order, without English stop words unless there are no others."""
    found = dict.fromkeys(words(text))
    return tuple(word for word in found if word not in STOP_WORDS) or tuple(found)
