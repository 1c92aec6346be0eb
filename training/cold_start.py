"""Default histories for users without one: the items clicked most for the query, by page views (spec §3.6).

Serving reads the table of the whole training log from the bundle. A training page view must not: the table counts its
own clicks. It gets what the same rule makes of the page views strictly before it.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from onesearch.context import default_sequence
from training.sessions import PageView


def default_table(views: Sequence[PageView]) -> Mapping[str, tuple[int, ...]]:
    """Query → default history by all given page views."""
    clicks: dict[str, Counter[int]] = defaultdict(Counter)
    for view in views:
        clicks[view.context.query].update(view.clicked)
    return {query: default_sequence(counts) for query, counts in clicks.items() if counts}


def with_defaults(views: Sequence[PageView]) -> list[PageView]:
    """Page views in time order, each with the default history of its query as it was before its own time."""
    clicks: dict[str, Counter[int]] = defaultdict(Counter)
    known: dict[str, tuple[int, ...]] = {}
    done: list[PageView] = []
    for _, group in groupby(views, key=lambda view: view.time):
        moment = list(group)
        for view in moment:
            context = replace(view.context, default_items=known.get(view.context.query, ()))
            done.append(replace(view, context=context))
        for view in moment:
            if view.clicked:
                query = view.context.query
                clicks[query].update(view.clicked)
                known[query] = default_sequence(clicks[query])
    return done
