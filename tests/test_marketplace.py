"""The simulated marketplace: reproducible, consistent with its own truth, learnable."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import orjson
import polars as pl
import pytest

from onesearch.errors import ConfigError
from training import marketplace
from training.marketplace import Marketplace, simulate, write_truth
from training.marketplace_log import MAX_CLICKS
from training.marketplace_needs import SHARES, grade
from training.marketplace_words import load_words, shrink
from training.marketplace_world import COLD_SHARE, DAY, Ints
from training.tables import Tables, load_tables, write_tables


@pytest.fixture(scope="module")
def market() -> Marketplace:
    return simulate(items=4_000, users=300, sessions=8_000, seed=5)


def table(market: Marketplace, name: str) -> pl.DataFrame:
    found: pl.DataFrame = getattr(market.tables, name)
    return found


def ids(lists: pl.Series) -> Ints:
    return lists.explode().drop_nulls().to_numpy()


def test_equal_seeds_give_equal_tables_and_other_seeds_others() -> None:
    one, same, other = (simulate(2_000, 20, 300, seed).tables for seed in (1, 1, 2))
    for field in fields(Tables):
        assert getattr(one, field.name).equals(getattr(same, field.name))
        assert not getattr(one, field.name).equals(getattr(other, field.name))


def test_tables_pass_the_strict_loader_unchanged(market: Marketplace, tmp_path: Path) -> None:
    write_tables(market.tables, tmp_path, "parquet")
    loaded = load_tables(tmp_path)
    for field in fields(Tables):
        assert getattr(loaded, field.name).equals(getattr(market.tables, field.name)), field.name
    assert loaded.dangling() == 0


def test_query_kinds_have_the_shares_of_the_specification(market: Marketplace) -> None:
    kinds = np.array([need.kind for need in market.needs])[market.log.need]
    for kind, share in SHARES.items():
        assert np.mean(kinds == kind) == pytest.approx(share, abs=0.02)


def test_queries_have_a_head_and_a_tail_and_belong_to_one_need(market: Marketplace) -> None:
    counts = table(market, "recall")["query"].value_counts(sort=True)["count"].to_numpy()
    assert counts[0] > 0.01 * len(market.log.need) and (counts == 1).mean() > 0.3
    texts = [text for need in market.needs for text in need.texts]
    assert len(texts) == len(set(texts))


def test_splits_follow_time_and_times_strictly_increase(market: Marketplace) -> None:
    recall = table(market, "recall")
    assert (recall["time_index"].diff().drop_nulls() > 0).all()
    assert recall["split"].rle().struct.field("value").to_list() == ["train", "valid", "test"]
    assert (recall["split"] == "test").mean() == pytest.approx(0.07, abs=0.001)


def test_the_funnel_narrows_and_shows_no_item_twice(market: Marketplace) -> None:
    recall = table(market, "recall")
    shown, clicked, carted, bought = (
        recall[f"{step}_item_ids"] for step in ("impressed", "clicked", "carted", "purchased")
    )
    assert (shown.list.n_unique() == shown.list.len()).all() and clicked.list.len().max() == MAX_CLICKS
    for wide, narrow in ((shown, clicked), (clicked, carted), (carted, bought)):
        assert (narrow.list.set_difference(wide).list.len() == 0).all()
        assert 0 < len(ids(narrow)) < 0.9 * len(ids(wide))


def test_nothing_is_shown_before_it_is_published(market: Marketplace) -> None:
    items, recall = table(market, "items"), table(market, "recall")
    published = items["published_at"].to_numpy()
    rows = recall.select("time_index", "impressed_item_ids").explode("impressed_item_ids").drop_nulls()
    assert (published[rows["impressed_item_ids"].to_numpy() - 1] <= rows["time_index"].to_numpy()).all()


def test_cold_items_are_a_week_old_and_seen_only_in_the_test_split(market: Marketplace) -> None:
    recall, published = table(market, "recall"), market.world.items.published_at
    before = recall.filter(pl.col("split") != "test")
    cold = published > before["time_index"].to_numpy().max()
    assert cold.mean() == pytest.approx(COLD_SHARE, abs=0.015)
    assert recall["time_index"].to_numpy().max() - published[cold].min() <= 7 * DAY
    assert not cold[ids(before["impressed_item_ids"]) - 1].any()
    assert cold[ids(recall["clicked_item_ids"]) - 1].any()


def test_relevance_grades_follow_the_generating_process(market: Marketplace) -> None:
    world = market.world
    need = next(need for need in market.needs if need.kind == "negation" and len(need.eligible) > 3)
    items = np.arange(len(world.items.type))
    score = grade(world, need, items)
    assert (np.flatnonzero(score == 3) == need.eligible).all()
    axis, value = need.negated[0]
    assert (score[world.holds(axis, value)] == 0).all() and set(score) == {0, 1, 2, 3}
    wanted = {want.type for want in need.wants}
    assert {int(t) for t in world.items.type[score == 2]} <= wanted
    assert not {int(t) for t in world.items.type[score == 1]} & wanted


def test_relevance_rows_match_the_needs_of_their_queries(market: Marketplace) -> None:
    relevance = table(market, "relevance")
    need_of = {text: need for need in market.needs for text in need.texts}
    assert set(relevance["score"]) == {0, 1, 2, 3}
    for query, item, score in relevance.select("query", "item_id", "score").sample(300, seed=0).iter_rows():
        assert grade(market.world, need_of[query], np.array([item - 1]))[0] == score


def test_rank_histories_and_counters_end_before_the_session(market: Marketplace) -> None:
    rank, recall = table(market, "rank"), table(market, "recall")
    row = rank.row(len(rank) // 2, named=True)
    past = recall.filter((pl.col("user_id") == row["user_id"]) & (pl.col("time_index") < row["time_index"]))
    assert row["recently_clicked_item_ids"] == ids(past["clicked_item_ids"]).tolist()[-20:]
    month = past.filter(pl.col("time_index") >= row["time_index"] - 30 * DAY)
    clicks = row["user_statistical_features"]["user_click_cnt_30d_hist"]
    assert clicks == len(ids(month["clicked_item_ids"]))
    window = recall.filter(
        pl.col("time_index").is_between(row["time_index"] - 30 * DAY, row["time_index"], "left")
    )
    shown = (window["impressed_item_ids"].explode() == row["target_item_id"]).sum()
    assert row["target_item_statistical_features"]["item_show_cnt_30d_hist"] == shown
    assert rank["session_id"].n_unique() == 1_000 and rank["session_id"].max() == len(recall)


def test_the_user_matters_beyond_the_intent_and_the_intent_beyond_chance(market: Marketplace) -> None:
    ceiling = market.ceilings()
    assert ceiling.clicks > 500
    assert ceiling.chance + 0.05 < ceiling.popularity < ceiling.oracle - 0.15


def test_titles_say_brand_and_product_type(market: Marketplace) -> None:
    items = table(market, "items")
    for title, brand, kind in items.select("item_title", "brand_name", "category_level3_name").iter_rows():
        assert title.startswith(f"{brand} ") and kind in title and "  " not in title
    assert items["item_title"].n_unique() > 0.97 * len(items)


def test_every_scene_wants_known_types_with_values_they_can_have() -> None:
    words = load_words()
    assert len(words.scenes) >= 60 and 6 <= len(words.departments) <= 8
    for scene in words.scenes:
        assert len(scene.phrases) >= 2 and len(scene.wants) >= 2
        for name, values in scene.wants:
            kind = words.types[words.type_index[name]]
            assert set(values) <= {*kind.materials, *kind.features}


def test_truth_explains_every_logged_query(market: Marketplace, tmp_path: Path) -> None:
    write_truth(market, tmp_path)
    queries = pl.read_parquet(tmp_path / "queries.parquet")
    needs = pl.read_parquet(tmp_path / "needs.parquet")
    assert set(table(market, "recall")["query"]) <= set(queries["query"])
    assert needs["need_id"].to_list() == list(range(len(market.needs)))
    want = orjson.loads(needs.filter(pl.col("kind") == "scene")["wants"][0])[0]
    assert want["constraints"][0]["axis"] in ("feature", "material") and want["type"] in load_words().type_index
    assert orjson.loads((tmp_path / "ceilings.json").read_bytes())["clicks"] > 0


def test_too_small_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="items: 10, expected 2000 to"):
        simulate(items=10)


def test_the_command_writes_tables_and_a_summary_and_refuses_a_foreign_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> object:
        monkeypatch.setattr("sys.argv", ["onesearch-simulate", *arguments])
        with pytest.raises(SystemExit) as ended:
            marketplace.main()
        return ended.value.code

    size = ("--items", "2000", "--users", "20", "--sessions", "300")
    assert run(str(tmp_path / "m"), *size) == 0
    assert "2000 items, 20 users, 300 sessions" in capsys.readouterr().out
    assert len(load_tables(tmp_path / "m").items) == 2_000
    assert run(str(tmp_path / "m"), *size, "--format", "jsonl") == 2
    assert "belongs to another data set" in capsys.readouterr().err
    assert run(str(tmp_path / "m"), *size, "--format", "csv") == 2
    assert run(str(tmp_path / "n"), *size, "--seed", "-1") == 2
    assert run(str(tmp_path / "n"), "--items", "9" * 20) == 2
    assert "items: 99999999999999999999, expected 2000 to 1000000000" in capsys.readouterr().err
    assert run(str(tmp_path / "m" / "items.parquet"), *size) == 2
    assert "File exists" in capsys.readouterr().err


def test_a_small_marketplace_sells_fewer_types_and_a_full_one_all() -> None:
    words = load_words()
    assert shrink(words, 20_000, np.random.default_rng(0)) == words
    small = shrink(words, 3_000, np.random.default_rng(0))
    assert len(small.types) == 50 and len(small.scenes) == 10
    assert {name for scene in small.scenes for name, _ in scene.wants} <= set(small.type_index)
