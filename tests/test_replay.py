"""No skew: logged requests replayed through the service's store give the prompts that training makes of the log."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import write_tiny_identifiers

from onesearch.bundle import open_renderer
from onesearch.context import MAX_RECENT_ITEMS, MAX_RECENT_QUERIES, ContextEncoder, SearchContext, profile_text
from onesearch.embedder import open_embedder
from onesearch.quantizer import Codebooks
from onesearch.sid import Codes
from service.events import Event
from service.store import Store
from training.columns import UNKNOWN
from training.marketplace import simulate
from training.sessions import page_views

pytestmark = pytest.mark.anyio


class EveryItem:
    """Gives every item id a SID of its own making."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes

    def sids_of(self, item_ids: Sequence[int]) -> Codes:
        rows = [[item // 7**level % size for level, size in enumerate(self._sizes)] for item in item_ids]
        return np.asarray(rows, dtype=np.uint16).reshape(-1, len(self._sizes))


async def test_what_is_served_equals_what_was_trained(store: Store, tmp_path: Path) -> None:
    write_tiny_identifiers(tmp_path / "parts")
    renderer, codebooks = open_renderer(tmp_path / "parts"), Codebooks.load(tmp_path / "parts" / "codebooks.npz")
    encoder = ContextEncoder(
        open_embedder(tmp_path / "parts" / "embedder"), codebooks, EveryItem(renderer.sids.spec.sizes)
    )
    tables = simulate(items=2_000, users=10, sessions=500, seed=3).tables
    assert tables.recall is not None and tables.users is not None
    start = int(tables.recall["time_index"].min())  # type: ignore[arg-type]

    def at(time: int) -> float:  # the months of the log in the minutes that the store remembers
        return 1.7e9 + (time - start) * 1e-6

    for user, gender, age in tables.users.select("user_id", "gender", "age_bucket").iter_rows():
        known = (None if part == UNKNOWN else part for part in (gender, age))
        await store.users.set_profile(str(user), profile_text(*known), at(start))

    def rendered(context: SearchContext) -> tuple[list[int], list[list[float]]]:
        prompt = renderer.prompt("search", encoder.fields(context))
        return prompt.ids.tolist(), prompt.history.tolist()

    rows = {row["session_id"]: row for row in tables.recall.iter_rows(named=True)}
    longest = SearchContext("")
    views = page_views(tables)
    for view in views:
        row, user, now = rows[view.session_id], str(view.user_id), at(view.time)
        served = (await store.users.visit(user, row["query"], [], now)).state.context(row["query"])
        assert served == view.context
        assert rendered(served) == rendered(view.context)
        done = [("click", item) for item in row["clicked_item_ids"]]
        done += [("order", item) for item in row["purchased_item_ids"]]
        events = [Event(f"{view.session_id}.{i}", kind, item, user, now) for i, (kind, item) in enumerate(done)]
        await store.events.record(events)
        longest = max(longest, served, key=lambda context: len(context.long_clicks))
    assert len(longest.recent_items) == MAX_RECENT_ITEMS  # histories were long enough to be cut
    assert max(len(view.context.recent_queries) for view in views) == MAX_RECENT_QUERIES
    assert rendered(replace(longest, recent_items=longest.recent_items[:-1])) != rendered(longest)
