"""Keywords of page views (spec §4.6): what a provider makes, with what training may see kept apart from what
serving sees; and the file in which `training.taqu` leaves them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from onesearch.arrays import write_atomically
from onesearch.errors import DataError
from onesearch.keywords import KeywordRules
from training.sessions import PageView

_MAX_FAULTS = 50


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


def write_keywords(path: Path, views: Sequence[PageView], made: Mapping[int, Keywords]) -> None:
    """Write the keywords of the page views that have some made, by session id: JSONL, whole or not at all."""
    lines = [
        orjson.dumps(
            {
                "session_id": view.session_id,
                "query": view.context.query,
                "kw": made[view.session_id].query,
                "p_kw_train": made[view.session_id].train,
                "p_kw_serve": made[view.session_id].serve,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
        for view in views
        if view.session_id in made
    ]
    write_atomically(path, b"".join(lines))


def file_keywords(path: Path) -> KeywordProvider:
    """The keywords of a file that `write_keywords` wrote; a page view that it lacks has none (spec §4.6.5).

    Raises DataError listing lines that are none, and when the file belongs to other page views.
    """
    known: dict[int, tuple[str, Keywords]] = {}
    faults: list[str] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(str(path), [f"cannot be read ({error.strerror})"]) from error
    for number, line in enumerate(lines, 1):
        try:
            row = orjson.loads(line)
            lists = (tuple(map(_text, row[name])) for name in ("kw", "p_kw_train", "p_kw_serve"))
            known[int(row["session_id"])] = (_text(row["query"]), Keywords(*lists))
        except (ValueError, KeyError, TypeError):
            faults.append(f"line {number}: {line[:60]!r}, expected session_id, query, kw, p_kw_train, p_kw_serve")
    if faults:
        raise DataError(str(path), faults[:_MAX_FAULTS])

    def provide(views: Sequence[PageView]) -> list[Keywords]:
        found = []
        for view in views:
            query, keywords = known.get(view.session_id, (view.context.query, Keywords((), (), ())))
            if query != view.context.query:
                fault = f"session {view.session_id} asked {view.context.query!r}, the file says {query!r}"
                raise DataError(str(path), [f"was made from other tables: {fault}"])
            found.append(keywords)
        return found

    return provide


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
