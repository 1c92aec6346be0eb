"""`onesearch-log export`: a shop's tables and what its service has logged since, as the tables of the next training."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from onesearch.command import HELP, start
from onesearch.errors import ConfigError, DataError, InputError
from onesearch.live import Change
from onesearch.progress import Meter, track
from service.events import Event, Exposure, period, read_entries
from service.journal import JOURNAL, Journal
from service.log_export import Log, item_rows, numbered, read_searches, recall_rows, user_rows
from service.log_tables import ITEMS, RECALL, USERS, must_be_new, read_rows, write_tables
from service.settings import Settings, load_settings
from service.store import open_store

_SHOWN_EVERY = 1000  # entries
app = typer.Typer(no_args_is_help=True, add_completion=False, context_settings=HELP)


@app.callback()
def _root() -> None:
    """What the service has logged."""


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Folder for the new tables; must not exist.")],
    data: Annotated[
        Path,
        typer.Option(help="Tables to go on from: those that the served bundle was made of, or an earlier export."),
    ],
    state: Annotated[str | None, typer.Option(help="Store with the log, as ONESEARCH_STATE.")] = None,
    catalog: Annotated[
        Path | None, typer.Option(help="Folder of the items changed while serving, as ONESEARCH_CATALOG.")
    ] = None,
    since: Annotated[datetime | None, typer.Option(help="First moment of a search, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(help="First moment no longer exported, UTC.")] = None,
) -> None:
    """Write the tables of DATA and what the service has logged since as a new set of tables.

    Every answered search becomes a row of recall, with its clicks, carts and
    orders until now: export again, and late orders are in. A search that DATA
    has from an earlier export is not there twice. By time, the last page views
    are test and those before them valid. Users get the profiles that the store
    has; items are those of DATA with all changes made while serving. The tables
    rank and relevance are copied.

    Clicks on the last searches may be still to come: --until leaves these out.
    Users that were forgotten (DELETE /v1/users) stay in the log until its
    retention ends, and in DATA.
    """
    settings = load_settings(state=state, catalog=catalog)
    must_be_new(out)
    items = read_rows(data, ITEMS)
    first = next(items, None)
    if first is None:
        raise DataError(str(data), ["has no items table, expected the tables that the served bundle was made of"])
    changes = _changes(settings.catalog, must_be=catalog is not None)
    log, profiles = asyncio.run(_read(settings))
    begin, end = period(since, until)
    searches = {name: search for name, search in log.searches.items() if begin <= search.at < end}
    if not searches:
        raise InputError("log", f"has {len(log.searches)} searches, none of them to export")
    users = numbered(
        "user ids", {s.user_id for s in searches.values() if s.user_id is not None}, keep_numbers=True
    )
    sessions = numbered("request ids", searches, keep_numbers=False)
    tables = {
        ITEMS: item_rows(chain((first,), items), changes),
        USERS: user_rows(read_rows(data, USERS), {users[n]: p for n, p in profiles.items() if n in users}),
        RECALL: track(
            recall_rows(
                partial(read_rows, data, RECALL), {sessions[n]: search for n, search in searches.items()}, users
            ),
            "page views",
        ),
    }
    sizes = write_tables(out, tables, copied=data)
    typer.echo(f"{out}: {_summary(log, len(searches))}")
    put = sum(change.item is not None for change in changes.values())
    typer.echo(
        f"{sizes[ITEMS]} items, {put} of them changed while serving and {len(changes) - put} removed or put back; "
        f"{sizes[USERS]} users, profiles of {len(profiles)} from the store; {sizes[RECALL]} page views"
    )


async def _read(settings: Settings) -> tuple[Log, dict[str, str]]:
    """The log, and the profiles that its users have in the store."""
    store = open_store(settings, create=False)
    try:
        with Meter("log entries", 0) as meter:
            log = await read_searches(_metered(read_entries(store.events), meter))
        names = sorted({search.user_id for search in log.searches.values() if search.user_id is not None})
        profiles = {name: (await store.users.read(name, time.time())).profile for name in track(names, "profiles")}
    finally:
        await store.close()
    return log, {name: profile for name, profile in profiles.items() if profile}


async def _metered(entries: AsyncIterator[Event | Exposure], meter: Meter) -> AsyncIterator[Event | Exposure]:
    unshown = 0
    async for entry in entries:
        yield entry
        unshown += 1
        if unshown == _SHOWN_EVERY:
            meter.advance(unshown, f"{datetime.fromtimestamp(entry.at, UTC):%Y-%m-%d %H:%M}")
            unshown = 0
    meter.advance(unshown)


def _changes(folder: Path, must_be: bool) -> dict[int, Change]:
    """The last change of each item that was changed while serving. Raises ConfigError if there has to be a journal and
    is none."""
    path = folder / JOURNAL
    if not path.is_file():
        if must_be:
            raise ConfigError(f"catalog: {path} is no file, expected the journal of a service")
        return {}
    journal = Journal(path)
    try:
        return {change.item_id: change for change in journal.since(0)}
    finally:
        journal.close()


def _summary(log: Log, exported: int) -> str:
    kinds = ", ".join(f"{count} {kind}s" for kind, count in log.attributed.items())
    return (
        f"{exported} of {len(log.searches)} searches in the log, {log.repeated} repeated; {kinds}; {log.stray} events "
        f"belong to no search that showed their item"
    )


def main() -> None:
    """The console script `onesearch-log`."""
    start(app)
