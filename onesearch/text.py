"""The one text normalisation, used before embedding, keyword matching, caching and tokenising."""

import unicodedata

MAX_QUERY_CHARS = 256


def normalise(text: str) -> str:
    """NFKC, casefold, `<`/`>` and control characters to spaces, white space collapsed.

    Angle brackets go because SID tokens are spelled `<a_0>`: text a user typed can never become a SID token.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = [" " if c in "<>" or unicodedata.category(c)[0] == "C" else c for c in folded]
    return " ".join("".join(kept).split())
