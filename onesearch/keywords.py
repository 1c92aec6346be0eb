"""Keyword rules: dictionary matches in a query, keywords known for frequent queries, and words of a category.

The dictionary maps a normalised phrase to its attribute type (18 types, spec §3.2). One Aho-Corasick pass finds all
phrases; those that do not start and end at a word are dropped (a character of a script without spaces is a word),
so `red` never matches inside `shredder`; overlaps go to the leftmost, then the longest. The seed cache maps
a normalised query to keywords made offline; it never saw the outcome of the request it is used for (spec §4.6.4).
A category that was found brings the attribute words it is known for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ahocorasick
import orjson

from onesearch.errors import BundleError
from onesearch.negation import permitted
from onesearch.text import WORD, normalise

KEYWORD_TYPES = (
    *("Entity", "Modifier", "Brand", "Material", "Style", "Function", "Location", "Audience", "Color"),
    *("Scene", "Specifications", "Price", "Model", "Anchor", "Series", "Marketing", "Season", "Pattern"),
)
MAX_KEYWORDS = 8


@dataclass(frozen=True)
class KeywordRules:
    """types: phrase → attribute type. seeds: normalised query → keywords. words: category → its attribute words.

    Keywords and words stand best first.
    """

    types: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def match(self, query: str) -> tuple[str, ...]:
        """At most MAX_KEYWORDS keywords of a query: its seeds, dictionary phrases it contains, words of categories.

        None of them names what the query excludes.
        """
        text = normalise(query)
        found = [*self.seeds.get(text, ()), *(phrase for phrase, _ in self.spans(text))]
        words = [word for phrase in found for word in self.words.get(phrase, ())]
        return tuple(dict.fromkeys(permitted([*found, *words], text)))[:MAX_KEYWORDS]

    def spans(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        """Phrases of the dictionary in normalised text with their character spans, longest leftmost first."""
        if not self.types:
            return []
        words = [m.span() for m in WORD.finditer(text)]
        at_start, at_end = {start for start, _ in words}, {stop for _, stop in words}
        hits = [(stop + 1 - size, stop + 1) for stop, size in self._automaton.iter(text)]
        whole = [span for span in hits if span[0] in at_start and span[1] in at_end]
        found: list[tuple[str, tuple[int, int]]] = []
        free = 0
        for start, stop in sorted(whole, key=lambda span: (span[0], -span[1])):
            if start >= free:
                found.append((text[start:stop], (start, stop)))
                free = stop
        return found

    @cached_property
    def _automaton(self) -> Any:
        """Aho-Corasick automaton of the phrases; a match yields its last position and the phrase's length."""
        automaton = ahocorasick.Automaton()
        for phrase in self.types:
            automaton.add_word(phrase, len(phrase))
        automaton.make_automaton()
        return automaton

    def save(self, path: Path) -> None:
        """Write as JSON, sorted, so that equal rules give equal bytes."""
        path.write_bytes(orjson.dumps(self.to_json(), option=orjson.OPT_SORT_KEYS))

    def to_json(self) -> dict[str, Any]:
        """All rules as plain values."""
        return {"types": dict(self.types), "seeds": dict(self.seeds), "words": dict(self.words)}


def load_keywords(path: Path) -> KeywordRules:
    """Read rules; a BundleError names what is wrong."""
    try:
        raw = orjson.loads(path.read_bytes())
        tables = raw["seeds"], raw.get("words", {})  # bundles from before categories had words lack them
        types, (seeds, words) = dict(raw["types"]), ({k: tuple(v) for k, v in t.items()} for t in tables)
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(str(path), [f"not a keyword file ({error!r})"]) from error
    unknown = sorted({t for t in types.values() if t not in KEYWORD_TYPES})
    if unknown:
        raise BundleError(str(path), [f"unknown keyword type {t!r}" for t in unknown])
    return KeywordRules(types, seeds, words)
