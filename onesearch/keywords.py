"""Keyword rules: dictionary matches in a query, and keywords known for frequent queries.

The dictionary maps a normalised phrase to its attribute type (18 types, spec §3.2). Matching is by whole words
(by character for text without spaces), longest leftmost first, without overlaps, so `red` never matches inside
`shredder`. The seed cache maps a normalised query to keywords made offline; it never saw the outcome of the
request it is used for (spec §4.6.4).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from onesearch.errors import BundleError
from onesearch.text import WORD, normalise

KEYWORD_TYPES = (
    *("Entity", "Modifier", "Brand", "Material", "Style", "Function", "Location", "Audience", "Color"),
    *("Scene", "Specifications", "Price", "Model", "Anchor", "Series", "Marketing", "Season", "Pattern"),
)
MAX_KEYWORDS = 8
_MAX_PHRASE = 5


@dataclass(frozen=True)
class KeywordRules:
    """types: phrase → attribute type. seeds: normalised query → keywords, best first."""

    types: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def match(self, query: str) -> tuple[str, ...]:
        """At most MAX_KEYWORDS keywords of a query: its seeds, then dictionary phrases it contains."""
        text = normalise(query)
        found = [*self.seeds.get(text, ()), *(phrase for phrase, _ in self.spans(text))]
        return tuple(dict.fromkeys(found))[:MAX_KEYWORDS]

    def spans(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        """Phrases of the dictionary in normalised text with their character spans, longest leftmost first."""
        words = [m.span() for m in WORD.finditer(text)]
        found: list[tuple[str, tuple[int, int]]] = []
        at = 0
        while at < len(words):
            length = min(_MAX_PHRASE, len(words) - at)
            while length and text[words[at][0] : words[at + length - 1][1]] not in self.types:
                length -= 1
            if length:
                span = (words[at][0], words[at + length - 1][1])
                found.append((text[slice(*span)], span))
            at += max(1, length)
        return found

    def save(self, path: Path) -> None:
        """Write as JSON, sorted, so that equal rules give equal bytes."""
        option = orjson.OPT_SORT_KEYS
        path.write_bytes(orjson.dumps({"types": dict(self.types), "seeds": dict(self.seeds)}, option=option))


def load_keywords(path: Path) -> KeywordRules:
    """Read rules; a BundleError names what is wrong."""
    try:
        raw = orjson.loads(path.read_bytes())
        types, seeds = dict(raw["types"]), {k: tuple(v) for k, v in raw["seeds"].items()}
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(str(path), [f"not a keyword file ({error!r})"]) from error
    unknown = sorted({t for t in types.values() if t not in KEYWORD_TYPES})
    if unknown:
        raise BundleError(str(path), [f"unknown keyword type {t!r}" for t in unknown])
    return KeywordRules(types, seeds)
