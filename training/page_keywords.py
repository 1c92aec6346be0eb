"""Keywords of page views (spec §4.6): what a provider makes, with what training may see kept apart from what
serving sees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onesearch.keywords import KeywordRules
from training.sessions import PageView


@dataclass(frozen=True)
class Keywords:
    """Keywords of one page view, best first.

    query: of the query alone (Step 2). train: personalised (Step 3), may know the outcome of the page view, so it is
    for teachers and training targets only. serve: personalised without the outcome; every evaluation uses it
    (spec §4.6.4).
    """

    query: tuple[str, ...]
    train: tuple[str, ...]
    serve: tuple[str, ...]


KeywordProvider = Callable[[Sequence[PageView]], list[Keywords]]  # one per page view, in order


def rule_keywords(rules: KeywordRules) -> KeywordProvider:
    """The keyword rules of the bundle, which know neither user nor outcome: all three lists are the same."""

    def provide(views: Sequence[PageView]) -> list[Keywords]:
        matched = {query: rules.match(query) for query in dict.fromkeys(view.context.query for view in views)}
        return [Keywords(*(matched[view.context.query],) * 3) for view in views]

    return provide
