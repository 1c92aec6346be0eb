"""Keyword providers: who makes the keywords of a query, and what a provider's answer must satisfy (spec §4.6).

Training (offline) and the near-line worker of the service share them. Two steps serve everybody who asks the same
query: analysis, then extraction. The third calibrates their keywords to one user. A provider for serving is told
only what was known when the user asked (spec §4.6.4); what the session led to is an argument of training's own.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from onesearch.errors import ProviderError
from onesearch.keywords import MAX_KEYWORDS, KeywordRules
from onesearch.llm import LlmClient
from onesearch.negation import HAN, permitted
from onesearch.taqu_prompts import NOT_EXTRACTABLE, SYSTEM, Language, analysis, calibration, extraction
from onesearch.text import normalise, words

MAX_PERSONAL = 5
MAX_HAN, MAX_CHARS, MAX_WORDS = 10, 40, 5
_SEPARATORS = re.compile(r"[,，、;；\n]+")
_NUMBERING = re.compile(r"^\s*(?:[-*•]|\d+\s*[.)、：:])\s*")
# Phrases that praise and sell but describe nothing; a keyword that holds one is dropped.
_FORBIDDEN = (
    *("free shipping", "best seller", "bestseller", "hot sale", "on sale", "discount", "cheap", "top rated"),
    *("official", "genuine", "new arrival", "limited offer", "must have", "high quality"),
    *("包邮", "爆款", "热卖", "特价", "正品", "官方", "旗舰店", "新款", "促销", "优惠", "限时", "网红", "高品质"),
)


@dataclass(frozen=True)
class UserNotes:
    """What was known of a user when they asked; clicks are titles, oldest first."""

    profile: str = ""
    queries: tuple[str, ...] = ()
    clicks: tuple[str, ...] = ()


class KeywordProvider(Protocol):
    """Makes keywords. Every method raises ProviderError when it cannot; that may pass, so it is worth a retry."""

    async def keywords(self, query: str) -> tuple[str, ...]:
        """At most MAX_KEYWORDS keywords of a normalised query, best first; none when it names no product."""
        ...

    async def personal(self, query: str, candidates: Sequence[str], user: UserNotes) -> tuple[str, ...]:
        """At most MAX_PERSONAL keywords of the query for one user, from the candidates and beyond."""
        ...


class RuleProvider:
    """The default, without an LLM: dictionary and seeds of a bundle; users' clicks order and extend them."""

    def __init__(self, rules: KeywordRules) -> None:
        self._rules = rules

    async def keywords(self, query: str) -> tuple[str, ...]:
        """See `KeywordProvider.keywords`."""
        return valid(self._rules.match(query), query, MAX_KEYWORDS)

    async def personal(self, query: str, candidates: Sequence[str], user: UserNotes) -> tuple[str, ...]:
        """Candidates that the user's related clicks mention come first, then other phrases of these clicks."""
        asked = set(words(query))
        related = [normalise(title) for title in user.clicks if asked & set(words(title))]
        seen = Counter(phrase for title in related for phrase, _ in self._rules.spans(title))
        ranked = sorted(candidates, key=lambda keyword: -seen[keyword])
        return valid([*ranked, *(phrase for phrase, _ in seen.most_common())], query, MAX_PERSONAL)


class LlmProvider:
    """The three steps with a language model."""

    def __init__(self, client: LlmClient, language: Language) -> None:
        self.client = client
        self._language = language

    async def keywords(self, query: str) -> tuple[str, ...]:
        """Steps 1 and 2."""
        understood = await self._ask(analysis(query, self._language))
        answer = await self._ask(extraction(query, understood, self._language))
        return keywords_of(answer, query, MAX_KEYWORDS)

    async def personal(
        self, query: str, candidates: Sequence[str], user: UserNotes, outcome: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """Step 3. outcome: titles the session led to, for training's teacher only; serving has none to give."""
        prompt = calibration(query, candidates, user.profile, user.queries, user.clicks, outcome, self._language)
        return keywords_of(await self._ask(prompt), query, MAX_PERSONAL)

    async def _ask(self, prompt: str) -> str:
        return await self.client.ask(SYSTEM[self._language], prompt)


def keywords_of(answer: str, query: str, limit: int) -> tuple[str, ...]:
    """The keywords of a model's answer; none when it says that there are none.

    Raises ProviderError when the answer is no list of keywords, or none of them is usable.
    """
    if any(phrase in normalise(answer) for phrase in NOT_EXTRACTABLE):
        return ()
    kept = valid((_NUMBERING.sub("", part) for part in _SEPARATORS.split(answer)), query, limit)
    if not kept:
        raise ProviderError("llm: the answer holds no usable keyword")
    return kept


def valid(keywords: Iterable[str], query: str, limit: int) -> tuple[str, ...]:
    """The usable ones of some keywords, normalised, without repeats, at most `limit` in their order.

    Dropped: too long, without a letter or digit, marketing, and whatever names something that the query excludes.
    """
    texts = (normalise(keyword).strip(" .。\"'“”‘’「」[]()（）") for keyword in keywords)
    return tuple(dict.fromkeys(permitted(filter(_is_keyword, texts), query)))[:limit]


def _is_keyword(text: str) -> bool:
    parts = words(text)
    if not parts or any(phrase in text for phrase in _FORBIDDEN):
        return False
    if HAN.search(text):
        return len(text.replace(" ", "")) <= MAX_HAN
    return len(text) <= MAX_CHARS and len(parts) <= MAX_WORDS
