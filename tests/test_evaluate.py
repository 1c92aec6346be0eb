import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import orjson
import polars as pl
import pytest
from command_line import invoke
from rich.console import Console
from tiny_bundle import tiny_items, write_tiny_bundle

from onesearch.catalog import Catalog, Item, columns_of, write_catalog
from onesearch.errors import ConfigError, DataError
from onesearch.keywords import KeywordRules
from onesearch.search import SearchOptions, SearchResult
from onesearch.text import normalise
from training import evaluate
from training.bootstrap import with_queries
from training.evaluate import records, show
from training.grades import measure_relevance, read_grades
from training.judgements import evaluate_judgements, read_judgements
from training.logged import best_sellers, evaluate_logs
from training.marketplace import simulate, write_truth
from training.marketplace_needs import grade
from training.negation import read_negations
from training.overlap import read_keywords
from training.package import catalog_items
from training.sessions import page_views
from training.subject import Subject
from training.tables import Tables, frame, write_tables
from trie import SidTrie

SIZES = (3, 2, 2, 2, 2)
# (item id, title, leaf category, SID, popularity): 11 and 12 share a SID, and 12 is the more popular one.
ITEMS = (
    (10, "red shoes", "shoes", (0, 0, 0, 0, 0), 1.0),
    (11, "blue shoes", "shoes", (0, 1, 0, 0, 0), 1.0),
    (12, "navy blue shoes", "shoes", (0, 1, 0, 0, 0), 2.0),
    (13, "red bag", "bags", (1, 0, 0, 0, 0), 1.0),
    (14, "green bag", "bags", (1, 0, 0, 0, 1), 1.0),
)
ROW_IDS = [10, 12, 11, 13, 14]  # item ids in catalog row order
ANSWERS = {"red": [0, 3], "blue shoes": [1, 2, 0], "bag": [4, 3]}


class FakeSearcher:
    """Answers each query with fixed rows and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def search(self, context, options):
        self.asked.append((context, options))
        rows = np.asarray(ANSWERS.get(context.query, []), dtype=np.int64)
        scores = -np.arange(len(rows), dtype=np.float32)
        return SearchResult(
            None, rows, scores, np.zeros(5, np.uint16), (), (), {"decode": 2.0, "expand": 1.0}, len(ITEMS)
        )


def free(context):
    """A model that writes code 0 everywhere but is undecided between the last codes."""

    def step(codes, parents):
        logits = np.zeros((len(codes), SIZES[codes.shape[1]]), dtype=np.float32)
        if codes.shape[1] < len(SIZES) - 1:
            logits[:, 0] = 50
        return logits

    return step


@pytest.fixture
def subject(tmp_path):
    folder = tmp_path / "items"
    folder.mkdir()
    items = [
        Item(item_id, title, category=(leaf,), attributes=(("description", f"{title} in store"),))
        for item_id, title, leaf, *_ in ITEMS
    ]
    sids = np.asarray([sid for *_, sid, _ in ITEMS], dtype=np.uint16)
    write_catalog(folder, items, sids, np.asarray([p for *_, p in ITEMS], dtype=np.float32))
    catalog = Catalog(folder)
    assert catalog.item_ids.tolist() == ROW_IDS
    return Subject(FakeSearcher(), free, catalog, SidTrie.build(sids, SIZES), SearchOptions(limit=100, width=8))


def session(number, query, clicked, split="test", bought=(), shown=(10, 11, 12, 13, 14, 99), user=0):
    return {
        "user_id": user,
        "session_id": number,
        "query": query,
        "time_index": number,
        "impressed_item_ids": list(shown),
        "clicked_item_ids": list(clicked),
        "purchased_item_ids": list(bought),
        "split": split,
    }


def item_table():
    ids, titles, *_ = zip(*ITEMS, strict=True)
    return frame("items", {"item_id": ids, "item_title": titles})


def views(*sessions):
    return page_views(Tables(item_table(), recall=recall(sessions)))


def recall(sessions):
    return frame("recall", {name: [row[name] for row in sessions] for name in sessions[0]})


TRAIN = (
    session(1, "red", [13], "train"),
    session(2, "red", [13, 10], "train"),
    session(3, "blue shoes", [12], "train"),
)
TEST = (
    session(4, "red", [10]),  # model rank 1, popularity (bags by clicks) misses it
    session(5, "blue shoes", [11], bought=[11]),  # model rank 2, SID rank 1, never clicked in training
    session(6, "bag", [13, 99]),  # rank 2 and an item the catalog lacks
    session(7, "red", []),
)


def measured(report, on, measure):
    (row,) = (row for row in report.measured if (row.slice, row.measure) == (on, measure))
    return row


def test_logs_give_the_numbers_computed_by_hand(subject):
    report = evaluate_logs(subject, views(*TRAIN, *TEST), "test", None, seed=0)
    hit = measured(report, "clicks", "HR@10")
    assert hit.count == 3
    assert hit.systems["model"].value == pytest.approx((1 + 1 + 0.5) / 3)
    # BM25: red shoes (rank 1), blue shoes (rank 1, the shorter title), bag (red bag: rank 1, the other is absent).
    assert hit.systems["bm25"].value == pytest.approx((1 + 1 + 0.5) / 3)
    assert hit.systems["popularity"].value == pytest.approx((0 + 1 + 0.5) / 3)
    assert hit.differences["popularity"].value == pytest.approx(1 / 3)
    assert measured(report, "clicks", "HR@1").systems["model"].value == pytest.approx(1 / 3)
    assert measured(report, "clicks", "MRR@10").systems["model"].value == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert measured(report, "clicks", "SID MRR@10").systems["model"].value == pytest.approx((1 + 1 + 0.25) / 3)
    assert measured(report, "clicks", "optimistic MRR@10").systems["model"].value == pytest.approx(
        (1 + 1 + 0.25) / 3
    )
    assert measured(report, "orders", "MRR@10").systems["model"].value == 0.5
    assert measured(report, "orders", "MRR@10").count == 1
    assert measured(report, "not clicked in train", "HR@10").count == 1


def test_logs_report_spread_validity_and_every_count(subject):
    report = evaluate_logs(subject, views(*TRAIN, *TEST), "test", None, seed=0)
    assert measured(report, "recommended items", "coverage@10").systems["model"].value == 1.0
    # All 48 possible SIDs are among the free beams, and 4 of them are live.
    assert measured(report, "beams without the trie", "valid SID@100").systems["model"].value == pytest.approx(
        0.04
    )
    assert report.facts["page_views"] == 4
    assert report.facts["page_views_without_click"] == 1
    assert report.facts["page_views_asked"] == 3
    assert report.facts["clicked_items_not_in_catalog"] == 1
    assert report.facts["sources"] == {"log": 3}
    assert report.facts["search_ms"] == {"p50": 3.0, "p95": 3.0}
    assert report.facts["train_count_of_query"] == {"tail": "<= 0", "middle": "> 0, <= 1", "head": "> 1"}
    assert [measured(report, f"{name} queries", "HR@10").count for name in ("head", "middle", "tail")] == [1, 1, 1]
    alike = ["mid-activity users", "high-activity users"]  # there is one user
    assert report.facts["empty_slices"] == [*alike, "cold items", "hot items"]  # no times, no orders in training


def test_users_are_told_apart_by_what_they_did_in_training(subject):
    train = (session(1, "red", [13], "train", user=2), session(2, "red", [13, 10], "train", bought=[13], user=3))
    test = (  # of users with nothing, a search and a click, and a search, two clicks and an order in training
        session(4, "red", [10], user=1),
        session(5, "blue shoes", [11], user=2),
        session(6, "bag", [13, 99], user=3),
    )
    report = evaluate_logs(subject, views(*train, *test), "test", None, seed=0)
    assert report.facts["train_count_of_user"] == {"low": "<= 0", "mid": "> 0, <= 2", "high": "> 2"}
    found = {name: measured(report, f"{name}-activity users", "MRR@10") for name in ("low", "mid", "high")}
    assert {name: row.count for name, row in found.items()} == {"low": 1, "mid": 1, "high": 1}
    assert [row.systems["model"].value for row in found.values()] == [1.0, 0.5, 0.25]


def test_results_that_show_what_a_query_excludes_are_counted(subject, tmp_path):
    (tmp_path / "truth").mkdir()
    kinds, negated = ["negation", "dupe"], ['[{"axis":"description","value":"red bag in store"}]'] * 2
    needs = pl.DataFrame({"need_id": [0, 1], "kind": kinds, "negated": negated})
    needs.write_parquet(tmp_path / "truth" / "needs.parquet")
    queries = pl.DataFrame({"query": ["Red", "bag"], "need_id": [0, 1]})
    queries.write_parquet(tmp_path / "truth" / "queries.parquet")
    negations = read_negations(tmp_path)
    assert negations == {"red": (("description", "red bag in store"),)}
    report = evaluate_logs(subject, views(*TRAIN, *TEST), "test", None, 0, negations)
    shown = measured(report, "queries with a negation", "violations@10")
    assert shown.count == 1
    assert {name: found.value for name, found in shown.systems.items()} == {
        "model": 0.5,
        "bm25": 0.5,
        "popularity": 0.5,
    }
    assert read_negations(tmp_path / "elsewhere") == {}


def test_keyword_overlap_and_breadth_by_hand(subject, tmp_path):
    """red is shown red shoes and red bag, blue shoes navy, blue and red shoes, bag green and red bag."""
    known = {"red": ("shoes", "store bag", "green", "lamp"), "blue shoes": ("blue",)}
    report = evaluate_logs(
        subject, views(*TRAIN, *TEST), "test", None, 0, keywords=lambda query: known.get(query, ())
    )
    overlap, breadth = (
        measured(report, "queries with keywords", f"keyword {m}@10") for m in ("overlap", "breadth")
    )
    assert overlap.count == breadth.count == 2  # bag has no keywords
    assert overlap.systems["model"].value == pytest.approx((2 / 2 + 2 / 3) / 2)  # red shoes are not blue
    assert breadth.systems["model"].value == pytest.approx(
        (2 / 4 + 1 / 1) / 2
    )  # shoes and store bag, not in one word
    assert overlap.systems["bm25"].value == pytest.approx((2 / 2 + 2 / 3) / 2)
    show(report, Console(file=(text := io.StringIO()), width=200))
    assert "keyword overlap@10" in text.getvalue() and "keyword breadth@10" in text.getvalue()
    nothing = evaluate_logs(subject, views(session(1, "lamp", [10])), "test", None, 0, keywords=lambda q: (q,))
    assert measured(nothing, "queries with keywords", "keyword overlap@10").systems["model"].value == 0


def test_keywords_of_queries_come_from_the_truth_or_else_from_the_rules(tmp_path):
    rules = KeywordRules({"bag": "Entity"})
    who, keywords = read_keywords(tmp_path, rules)
    assert (who, keywords("a bag")) == ("rules", ("bag",))
    write_truth(market := simulate(items=2000, users=20, sessions=100, seed=3), tmp_path / "truth")
    who, keywords = read_keywords(tmp_path, rules)
    assert who == "truth" and keywords("a bag of nobody") == ()
    found = [keywords(normalise(query)) for query in market.tables.recall["query"]]
    assert all(phrase for phrases in found for phrase in phrases) and any(found)


def test_category_hits_and_calibration_by_hand(subject):
    report = evaluate_logs(subject, views(*TRAIN, *TEST), "test", None, seed=0)
    # red: shoes, bag for a shoe; blue shoes: a shoe; bag: bags, for a bag and an item the catalog lacks
    hit = measured(report, "clicks", "category hit@10")
    assert hit.systems["model"].value == pytest.approx((1 + 1 + 0.5) / 3)
    # FakeSearcher scores rows 0, -1, -2 (probabilities 1, e^-1, e^-2); rows 1 and 2 are one SID, which counts once.
    # red: 10 right (1), 13 wrong; blue shoes: SID of 11 right, 10 wrong (e^-2); bag: 14 wrong, 13 is half of the clicks
    e1, e2 = np.exp(-1), np.exp(-2)
    pairs = [(1, 1), (e1, 0), (1, 1), (e2, 0), (1, 0), (e1, 0.5)]
    error = measured(report, "beam scores", "ECE@10")
    assert error.count == 6 and error.systems["model"].low is None
    assert error.systems["model"].value == pytest.approx(np.mean([abs(p - o) for p, o in pairs]))  # a bin each


def test_cold_and_hot_items_by_hand(subject):
    day = 86_400
    subject.catalog.columns.arrays["published_at"] = np.array([1, 5, 9, 0, 20]) * day  # rows of ROW_IDS
    train = (session(1, "red", [13, 14], "train", bought=[13, 14]), session(2, "red", [13], "train", bought=[13]))
    tests = [
        session(10 * day, "red", [10]),  # 9 days old
        session(12 * day, "blue shoes", [12, 11]),  # 7 and 3 days old
        session(13 * day, "bag", [13, 14]),  # no time, and published later
    ]
    report = evaluate_logs(subject, views(*train, *tests), "test", None, seed=0)
    cold = measured(report, "cold items", "HR@10")
    assert (cold.count, cold.systems["model"].value) == (1, 1.0)
    # one of two bags is hot (10 % rounded up): 13 sold most; no shoe sold at all
    hot = measured(report, "hot items", "HR@10")
    assert (hot.count, hot.systems["model"].value) == (1, 1.0)
    found = best_sellers(subject.catalog, views(*train))
    assert [i for i, is_hot in zip(ROW_IDS, found, strict=True) if is_hot] == [13]


def test_relevance_is_graded_by_the_relevance_table_where_there_is_no_truth(subject, tmp_path):
    relevance = pl.DataFrame(
        {"query": ["Red", "red", "bag", "red"], "score": [3, 1, 0, 2], "item_id": [13, 10, 13, 99]}
    )
    grader = read_grades(tmp_path, relevance, subject.catalog)
    assert grader("red").tolist() == [1, 0, 0, 3, 0]
    assert grader("elsewhere") is None
    (row,) = measure_relevance(["red", "bag", "other"], {"model": [np.array([0, 3])] * 3}, grader, "model", 0)
    assert row.count == 1
    assert row.systems["model"].value == pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))
    assert read_grades(tmp_path, None, subject.catalog)("red") is None


def test_the_truth_of_a_simulation_grades_as_the_simulation_does(tmp_path):
    market = simulate(items=2_000, users=50, sessions=500, seed=5)
    write_truth(market, tmp_path / "truth")
    items = catalog_items(market.tables.items)
    catalog = Catalog.of(columns_of(items, np.zeros((len(items), 5), np.uint16), np.zeros(len(items), np.float32)))
    grader = read_grades(tmp_path, market.tables.relevance, catalog)
    positions = catalog.item_ids - 1
    assert {need.kind for need in market.needs} > {"negation", "dupe"}
    for need in market.needs:
        visible = replace(need, negated=tuple((axis, v) for axis, v in need.negated if axis != "tier"))
        found, expected = grader(normalise(need.texts[0])), grade(market.world, visible, positions)
        assert found.tolist() == expected.tolist()


def test_a_slice_without_page_views_is_named_and_not_measured(subject):
    report = evaluate_logs(subject, views(*TRAIN, TEST[0]), "test", None, seed=0)
    assert "orders" in report.facts["empty_slices"]
    assert not [row for row in report.measured if row.slice == "orders"]


def test_a_sample_is_drawn_by_seed_and_searches_with_the_given_options(subject):
    many = [session(10 + i, f"query {i}", [10]) for i in range(20)]
    for _ in range(2):
        assert evaluate_logs(subject, views(*many), "test", 5, seed=3).facts["page_views_asked"] == 5
    asked = [context.query for context, _ in subject.searcher.asked]
    assert asked[:5] == asked[5:]
    evaluate_logs(subject, views(*many), "test", 5, seed=4)
    assert asked[:5] != [context.query for context, _ in subject.searcher.asked[10:]]
    assert {options.limit for _, options in subject.searcher.asked} == {100}


@pytest.mark.parametrize("sessions", [TRAIN, (*TRAIN, TEST[3])])
def test_a_split_without_clicks_is_an_error_that_says_so(subject, sessions):
    with pytest.raises(DataError, match=rf"{len(sessions) - 3} page views of split 'test', none with a click"):
        evaluate_logs(subject, views(*sessions), "test", None, seed=0)


def rated(tmp_path, *rows):
    path = tmp_path / "ratings.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else orjson.dumps(row) for row in rows))
    return path


def rating(query, item, value):
    return {"query": query, "item_id": item, "rating": value}


def test_judgements_give_the_numbers_computed_by_hand(subject, tmp_path):
    rows = [rating("Red", 13, 3), rating("red", 10, 0), rating("bag", 13, 0), rating("bag", 99, 0)]
    report = evaluate_judgements(subject, read_judgements(rated(tmp_path, *rows, rows[0])), None, seed=0)
    ndcg = measured(report, "queries with a positive", "nDCG@10")
    assert ndcg.count == 1
    assert ndcg.systems["model"].value == pytest.approx(1 / np.log2(3))
    assert ndcg.systems["bm25"].value == pytest.approx(1 / np.log2(3))  # red shoes, then red bag, by row
    assert ndcg.differences["bm25"].value == 0
    assert measured(report, "queries with a positive", "MRR@10").systems["model"].value == 0.5
    assert measured(report, "all judged queries", "nDCG@10").systems["model"].value == pytest.approx(
        0.5 / np.log2(3)
    )
    assert measured(report, "all judged queries", "judged@10").systems["model"].value == 0.75
    assert measured(report, "beams without the trie", "valid SID@100").count == 2
    assert report.facts["ratings"] == 4
    assert report.facts["ratings_repeated"] == 1
    assert report.facts["ratings_of_items_not_in_catalog"] == 1


def test_every_fault_of_a_ratings_file_is_listed(tmp_path):
    rows = [
        rating("red", 10, 1),
        b"{",
        {"query": "red", "item": 1},
        rating(" ", 1, 1),
        rating("red", "10", 1),
        rating("red", 10, True),
        rating("red", 10, -1),
        rating("RED", 10, 2),
    ]
    with pytest.raises(DataError) as caught:
        read_judgements(rated(tmp_path, *rows))
    assert [fault.split(":")[0] for fault in caught.value.faults] == [f"line {n}" for n in range(2, 9)]
    assert "rated 1 before" in caught.value.faults[-1]
    with pytest.raises(DataError, match="no lines"):
        read_judgements(rated(tmp_path))
    with pytest.raises(DataError, match="cannot be read"):
        read_judgements(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="and 10 more"):
        read_judgements(rated(tmp_path, *[b"{"] * 60))


def test_a_report_is_shown_as_one_table_and_as_json_records(subject):
    report = evaluate_logs(subject, views(*TRAIN, *TEST), "test", None, seed=0)
    shown = io.StringIO()
    show(report, Console(file=shown, width=160))
    text = shown.getvalue()
    assert "0.833 [0.500, 1.000]" in text
    assert "model - popularity" in text
    assert "clicked_items_not_in_catalog: 1" in text
    first, *rest = map(orjson.loads, map(orjson.dumps, records(report)))
    assert first["kind"] == "run"
    assert {row["kind"] for row in rest} == {"measure"}
    assert rest[0]["systems"]["model"].keys() == {"value", "low", "high"}


def test_without_logs_only_a_bootstrapped_bundle_is_measured_and_on_its_own_queries():
    items = item_table()
    with pytest.raises(ConfigError, match="the tables hold no recall sessions"):
        with_queries(Tables(items), allowed=False, seed=1)
    made = with_queries(Tables(items), allowed=True, seed=1).recall
    assert set(made["source"]) == {"bootstrap"}
    assert made.equals(with_queries(Tables(items), allowed=True, seed=1).recall)


@pytest.fixture(scope="module")
def tiny_shop(tmp_path_factory):
    """A sealed bundle of an untrained model, tables of its items with some sessions, and a file of ratings."""
    folder = tmp_path_factory.mktemp("shop")
    write_tiny_bundle(folder)
    items = tiny_items()
    titles = items["item_title"].to_list()
    sessions = [
        session(i, titles[i % 7], [i], "train" if i < 15 else "test", shown=range(31)) for i in range(1, 31)
    ]
    write_tables(Tables(items, recall=recall(sessions)), folder / "data")
    rated(folder, rating("red shoes", 1, 3), rating("blue bag", 2, 1))
    return folder


def run(*arguments):
    return invoke(evaluate.main, *arguments)


def test_the_command_measures_a_bundle_on_logs(tiny_shop):
    out = tiny_shop / "report.json"
    arguments = (tiny_shop / "bundle", "--data", tiny_shop / "data", "--width", 16, "--max-requests", 4)
    result = run(*arguments, "--keywords", "--json", "--out", out)
    assert result.exit_code == 0
    header, *measures = map(orjson.loads, result.stdout.splitlines())
    assert header["decoder"] == "torch"
    assert header["hardware"]
    assert header["query_keywords_from"] == "rules"
    assert (header["items"], header["items_only_in_data"], header["page_views_asked"]) == (30, 0, 4)
    found = {(row["slice"], row["measure"]): row["systems"] for row in measures}
    assert found["clicks", "HR@10"].keys() == {"model", "bm25", "popularity"}
    assert 0 <= found["beams without the trie", "valid SID@10"]["model"]["value"] <= 1
    assert found["queries with keywords", "keyword breadth@10"]["bm25"]["value"] == 1  # titles as queries
    found_units = orjson.loads(out.read_bytes())["units"]
    assert len(found_units["session"]) == len(found_units["rank"]) == header["clicked_items"]
    assert orjson.loads(out.read_bytes()) == {"run": header, "measures": measures, "units": found_units}
    again = [orjson.loads(line) for line in run(*arguments, "--keywords", "--json").stdout.splitlines()]
    assert again[1:] == measures


def test_the_command_measures_a_bundle_on_ratings(tiny_shop):
    arguments = (tiny_shop / "bundle", "--data", tiny_shop / "data", "--judgements", tiny_shop / "ratings.jsonl")
    result = run(*arguments, "--width", 64, "--score", "legal")
    assert result.exit_code == 0
    assert "nDCG@10 judged only" in result.stdout
    assert "rated_queries: 2" in result.stdout


def test_a_wrong_input_ends_the_command_with_its_faults(tiny_shop, tmp_path):
    result = run(tmp_path, "--data", tmp_path)
    assert result.exit_code == 2
    assert "items.jsonl or items.parquet is missing" in result.stderr
    result = run(tiny_shop / "bundle", "--data", tiny_shop / "data", "--split", "valid")
    assert result.exit_code == 2
    assert "0 page views of split 'valid'" in result.stderr


def test_importing_the_command_does_not_load_torch():
    code = "import sys, training.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
