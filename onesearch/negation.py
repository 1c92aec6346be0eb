"""What a query excludes: no keyword may name it (spec §4.6.6)."""

import re
from collections.abc import Iterable

from onesearch.text import normalise, words

HAN = re.compile(r"[\u3400-\u9fff]")
_NEGATION = re.compile(
    r"\b(?:no|not|non|without|except|excluding|minus|anything but)[\s-]+(?:(?:a|an|the|any|too|in|with)\s+)*"
    r"([^\W\d_\u3400-\u9fff]+)|(\w+)[\s-]free\b|(?:不要|不含|不带|不是|不想要|没有|除了|不加|无|非|别)\s*([\u3400-\u9fff]{1,2})"
)


def negated(query: str) -> frozenset[str]:
    """What a query excludes, by its first word or first two Han characters: "lamp not red" → red, 不要高领 → 高领."""
    return frozenset("".join(match.groups("")) for match in _NEGATION.finditer(normalise(query)))


def permitted(keywords: Iterable[str], query: str) -> list[str]:
    """The keywords that name nothing the query excludes, in their order."""
    excluded = negated(query)
    return [keyword for keyword in keywords if not (excluded and _violates(keyword, excluded))]


def _violates(keyword: str, excluded: frozenset[str]) -> bool:
    """Whether a keyword names something excluded; one that excludes it, too ("sugar free"), does not."""
    own, parts = negated(keyword), set(words(keyword))
    return any((term in keyword if HAN.search(term) else term in parts) for term in excluded - own)
