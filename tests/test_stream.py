"""The streaming update on a small shop: windows in time order, replay, the gate, publishing, resuming after a kill."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import polars as pl
import pytest

from onesearch.bundle import CONTRACT, open_bundle, sha256
from onesearch.context import SearchContext
from onesearch.errors import ConfigError, DataError
from onesearch.model import TorchDecoder, open_model
from onesearch.search import Searcher, SearchOptions
from training import microbatch
from training.columns import SCHEMAS, frame_schema
from training.ledger import CURRENT, LEDGER, alone, read_ledger
from training.microbatch import Log, StreamConfig, mix
from training.pipeline import Work, train_bundle
from training.probe import GateConfig, Numbers
from training.recipe import load_recipe, read_toml
from training.sessions import page_views
from training.stages import DpoStage, RewardConfig, TpmaStage
from training.stream import follow, main
from training.tables import Tables, frame, write_tables

RECIPE = """
name = "small"
threads = 1
golden_examples = 3
[embedder]
buckets = 512
svd_dim = 16
dim = 8
epochs = 1
finetune_epochs = 1
[codebooks]
sizes = [6, 4, 4, 3, 3]
iterations = 5
[tokenizer]
vocab_size = 600
[model]
d_model = 32
heads = 2
ffn = 32
encoder_layers = 1
decoder_layers = 1
dropout = 0.0
[[stages]]
name = "search"
steps = 100
batch = 64
lr = 1e-2
mixture = { search = 1.0 }
"""
COLOURS = ("red", "blue", "green", "black", "white", "pink", "brown", "grey")
THINGS = ("shoes", "bag", "lamp", "towel", "mug", "rug", "chair", "desk", "scarf", "belt")
TRAINED, WINDOW = 10_000, 1000  # the time of the last training page view, and a window of the stream
OPEN = GateConfig(hr=1.0, valid=1.0, ndcg=1.0, kl=1e9)
STAGES = (DpoStage("prefer", 4, batch=8, lr=1e-3), TpmaStage("policy", 4, batch=4, group=4, lr=1e-3))
CONFIG = StreamConfig(threads=1, window=WINDOW, delay=500, probe=20, stages=STAGES, gate=OPEN)
NEW = 900


def items(new_at: int | None = None) -> pl.DataFrame:
    """Eighty items `1…80`, each colour of each thing; with new_at also a leather sofa that is published then."""
    defaults = {c.name: c.default for c in SCHEMAS["items"]}
    named = [(1 + i, f"{c} {t}", t, 0) for i, (t, c) in enumerate((t, c) for t in THINGS for c in COLOURS)]
    named += [] if new_at is None else [(NEW, "leather sofa", "sofa", new_at)]
    rows = [
        {**defaults, "item_id": i, "item_title": title, "category_level1_name": "goods"}
        | {"category_level2_name": thing, "published_at": at}
        for i, title, thing, at in named
    ]
    return pl.DataFrame(rows, schema=frame_schema("items"))


def recall(times: range, first: int, split: str, shift: int = 0, seed: int = 0) -> pl.DataFrame:
    """A page view per time: somebody asks for an item by its title, clicks it (or the one `shift` further), every
    fourth orders it."""
    rng = np.random.default_rng([seed, first])
    asked = rng.integers(80, size=len(times)).tolist()
    clicked = [1 + (row + shift) % 80 for row in asked]
    shown = [[*rng.integers(1, 81, 5).tolist(), item] for item in clicked]
    titles = items()["item_title"].to_list()
    return frame(
        "recall",
        {
            "user_id": rng.integers(1, 20, len(times)).tolist(),
            "session_id": list(range(first, first + len(times))),
            "query": [titles[row] for row in asked],
            "time_index": list(times),
            "impressed_item_ids": shown,
            "clicked_item_ids": [[item] for item in clicked],
            "purchased_item_ids": [[item] if i % 4 == 0 else [] for i, item in enumerate(clicked)],
            "split": [split] * len(times),
        },
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.DataFrame]:
    """A bundle of the small shop that finds most of what is asked for, and its log."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "recipe.toml").write_text(RECIPE)
    past = pl.concat([recall(range(0, TRAINED + 1, 10), 1, "train"), recall(range(10_001, 10_061), 5000, "valid")])
    write_tables(Tables(items(), recall=past), folder / "data")
    (folder / "work").mkdir()
    train_bundle(load_recipe(folder / "recipe.toml"), folder / "data", folder / "bundle", Work(folder / "work"))
    return folder / "bundle", past


def shop(folder: Path, past: pl.DataFrame, news: pl.DataFrame, new_at: int | None = None) -> Path:
    """Tables in which the log went on."""
    write_tables(Tables(items(new_at), recall=pl.concat([past, news])), folder / "data")
    return folder / "data"


def ids_found(bundle: Path, query: str, limit: int = 10) -> list[int]:
    opened = open_bundle(bundle)
    found = Searcher(opened, TorchDecoder(open_model(bundle.resolve()), opened.renderer)).search(
        SearchContext(query), SearchOptions(limit=limit)
    )
    return [int(i) for i in found.catalog.ids_at(found.rows)]


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_new_item_is_found_one_window_later_by_the_frozen_tokenizer(
    trained: tuple[Path, pl.DataFrame], tmp_path: Path
) -> None:
    bundle, past = trained
    before = contents(bundle)
    data = shop(tmp_path, past, recall(range(11_001, 13_001, 25), 6000, "train"), new_at=TRAINED + 1500)
    rows = follow(CONFIG, bundle, data, tmp_path / "out")
    assert [(row.start, row.end, row.published) for row in rows] == [
        (TRAINED, TRAINED, True),
        (TRAINED, 11_000, True),
        (11_000, 12_000, True),
    ]  # the rest of the log is no whole window
    assert [row.new_items for row in rows] == [0, 0, 1]
    assert NEW not in ids_found(tmp_path / "out" / "0001", "leather sofa", 100)
    assert NEW in ids_found(tmp_path / "out" / "0002", "leather sofa", 100)
    opened = open_bundle(tmp_path / "out" / CURRENT)
    row = opened.catalog.row_of(NEW)
    assert row is not None
    text = opened.catalog.item(row).text()
    assert (opened.catalog.sids[row] == open_bundle(bundle).encoder.query_sids([text])[0]).all()
    assert opened.trie.contains(opened.catalog.sids[[row]]).all()
    after = contents(tmp_path / "out" / "0002")
    frozen = [name for name in before if name.split("/")[0] in CONTRACT]
    assert len(frozen) >= 5 and {name: after[name] for name in frozen} == {name: before[name] for name in frozen}
    assert after["weights.safetensors"] != before["weights.safetensors"]
    assert opened.manifest.digest == open_bundle(bundle).manifest.digest
    assert open_bundle(bundle).manifest.metrics["until"] == TRAINED and opened.manifest.metrics["until"] == 12_000
    assert (tmp_path / "out" / CURRENT).readlink() == Path("0002") and contents(bundle) == before


def test_an_intervention_raises_the_share_of_exposure(trained: tuple[Path, pl.DataFrame], tmp_path: Path) -> None:
    bundle, past = trained
    data = shop(tmp_path, past, recall(range(10_100, 11_001, 5), 6000, "train"))
    emerging = [
        item for item, thing in items().select("item_id", "category_level2_name").rows() if thing == "lamp"
    ]
    stage = TpmaStage("policy", 20, batch=8, group=8, lr=3e-3, constrained=True, w_item=3.0)
    shares = []
    for bonus in (0.0, 2.0, 10.0):
        table = tmp_path / f"{bonus}.jsonl"
        lines = [{"item_id": i, "bonus": bonus, "start": 0, "end": 10**9} for i in emerging]
        table.write_bytes(b"\n".join(map(orjson.dumps, lines)))
        stages = (replace(stage, reward=RewardConfig(bonuses=str(table))),)
        out = tmp_path / f"out-{bonus}"
        follow(replace(CONFIG, stages=stages), bundle, data, out)
        shown = [i for query in items()["item_title"].to_list()[::7] for i in ids_found(out / CURRENT, query)]
        shares.append(sum(i in emerging for i in shown) / len(shown))
    assert shares == sorted(shares) and shares[-1] > shares[0] + 0.02, shares


def test_replay_bounds_what_the_probe_forgets(
    trained: tuple[Path, pl.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, past = trained
    data = shop(tmp_path, past, recall(range(10_100, 11_001, 5), 6000, "train", shift=37))
    monkeypatch.setattr(microbatch, "MIN_REPLAY", 0.0)
    rows = {}
    for share in (0.0, 0.3, 0.7):
        stages = (DpoStage("prefer", 30, batch=16, lr=3e-3),)
        out = tmp_path / f"out-{share}"
        rows[share] = follow(replace(CONFIG, replay=share, stages=stages), bundle, data, out)[-1]
    kept = [row.numbers["hr"] for row in rows.values() if row.numbers]
    drift = [row.numbers["kl"] for row in rows.values() if row.numbers]
    assert kept[0] < kept[1] < kept[2] and drift[0] > drift[1] > drift[2]
    assert rows[0.0].replayed == 0 and rows[0.3].replayed >= 0.3 * (rows[0.3].fresh + rows[0.3].replayed)


def test_an_order_teaches_once_its_delay_has_passed(trained: tuple[Path, pl.DataFrame], tmp_path: Path) -> None:
    _, past = trained
    news = frame(
        "recall",
        {
            "user_id": [1, 2],
            "session_id": [1, 2],
            "query": ["red shoes", "blue bag"],
            "time_index": [10_700, 10_400],
            "impressed_item_ids": [[1, 2, 3], [10, 11]],
            "clicked_item_ids": [[1], [10]],
            "purchased_item_ids": [[2], [10]],  # 2 was ordered without a click
            "split": ["train"] * 2,
        },
    )
    log = Log.of(Tables(items(), recall=news), [])
    live = dict.fromkeys(range(1, 81))
    config = replace(CONFIG, replay=0.5)

    def learned(start: int, end: int) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        old = page_views(Tables(items(), recall=past))[:50]
        known = [*old, *log.known(end, config.delay)]
        chosen = mix(known, start, config, live, seed=1)
        assert len(chosen.replayed) == len(chosen.fresh) and not chosen.fresh & chosen.replayed
        return [(known[i].session_id, known[i].clicked, known[i].ordered) for i in sorted(chosen.fresh)]

    assert learned(10_000, 11_000) == [(2, (10,), (10,)), (1, (1,), ())]
    assert learned(11_000, 12_000) == [(1, (1, 2), (2,))]
    assert learned(12_000, 13_000) == []


def test_windows_in_which_nothing_became_known_are_passed_over() -> None:
    def begins(views: list[tuple[int, bool]], end: int) -> int | None:
        columns = {
            "user_id": [1] * len(views),
            "session_id": list(range(len(views))),
            "query": ["red shoes"] * len(views),
            "time_index": [time for time, _ in views],
            "impressed_item_ids": [[1]] * len(views),
            "clicked_item_ids": [[1]] * len(views),
            "purchased_item_ids": [[1] if ordered else [] for _, ordered in views],
        }
        return Log.of(Tables(items(), recall=frame("recall", columns)), []).begin(end, CONFIG)

    late = (200_000, False)
    assert begins([(10_000, False), late], 10_000) == 199_000  # a window holds its end, not its start
    assert begins([(10_000, False), (99_001, False), late], 10_000) == 99_000
    assert begins([(11_000, False), late], 10_000) == 10_000
    assert begins([(11_001, False), late], 10_000) == 11_000
    assert begins([(10_000, True), late], 10_000) == 10_000  # its order becomes known at 10,500
    assert begins([(10_000, True), late], 10_500) is None  # the window would end at 200,500, the log does before
    assert begins([(10_000, True), (200_500, False)], 10_500) == 199_500
    assert begins([(10_000, False)], 10_000) is None


def test_old_page_views_have_their_share_however_few_there_are(trained: tuple[Path, pl.DataFrame]) -> None:
    views = [replace(view, ordered=()) for view in page_views(Tables(items(), recall=trained[1]))[:200]]
    live = dict.fromkeys(range(1, 81))
    for share in (0.3, 0.5, 0.9):
        for begin in (-1, 0, 50, 1000, 1900, 1980):  # a view every 10, so the old ones are 0, 1, 6, 101, 191, 199
            chosen = mix(views, begin, replace(CONFIG, replay=share), live, seed=1)
            assert all(views[i].time > begin for i in chosen.fresh)
            assert all(views[i].time <= begin for i in chosen.replayed)
            assert len(chosen.replayed) >= share * (len(chosen.fresh) + len(chosen.replayed)) - 1e-9
            old = sum(view.time <= begin for view in views)
            assert abs(len(chosen.fresh) - min(len(views) - old, old * (1 - share) / share)) <= 1


def test_the_gate_refuses_a_wrecked_model_and_nothing_changes(
    trained: tuple[Path, pl.DataFrame], tmp_path: Path
) -> None:
    bundle, past = trained
    data = shop(tmp_path, past, recall(range(10_100, 13_001, 25), 6000, "train"))
    config = replace(CONFIG, stages=STAGES[:1], gate=GateConfig(hr=0.3, valid=1.0, ndcg=1.0, kl=1e9))
    good = follow(config, bundle, data, tmp_path / "out", windows=1)[-1]
    assert good.published, good.reason
    served = contents(tmp_path / "out" / "0001")
    wreck = replace(config, stages=(DpoStage("prefer", 5, batch=8, lr=1.0, warmup=0.0),))
    bad = follow(wreck, bundle, data, tmp_path / "out", windows=1)[-1]
    assert not bad.published and bad.reason.startswith("HR@10 is 0.") and "expected at least" in bad.reason
    assert (bad.bundle, bad.model_version) == (good.bundle, good.model_version)
    assert contents(tmp_path / "out" / "0001") == served and not (tmp_path / "out" / "0002").exists()
    assert (tmp_path / "out" / CURRENT).readlink() == Path("0001")
    again = follow(config, bundle, data, tmp_path / "out")[-1]  # the next window goes on from what is served
    assert again.published and again.window == 3 and again.bundle == "0003"


def test_each_number_of_the_gate_can_refuse() -> None:
    gate = GateConfig(hr=0.02, valid=0.05, ndcg=0.02, kl=0.5)
    served = [
        {"hr": 0.3, "valid": 0.7, "ndcg": 0.9, "kl": 0.0},
        {"hr": 0.32, "valid": 0.6, "ndcg": None, "kl": 0.0},
    ]
    good = Numbers(0.31, 0.66, 0.89, 0.4, ())
    assert gate.refusal(good, served) == ""
    assert gate.refusal(replace(good, ndcg=None), served) == ""
    bad = {"hr": 0.299, "valid": 0.64, "ndcg": 0.87, "kl": 0.6}
    shown = {"hr": "HR@10", "valid": "valid SID@10", "ndcg": "nDCG@10", "kl": "KL"}
    for name, value in bad.items():
        for wrong in (value, float("nan")):
            assert gate.refusal(replace(good, **{name: wrong}), served).startswith(shown[name])


@pytest.mark.parametrize(
    ("steps", "reason"), [(1, "expected a finite number"), (3, "stage prefer: the loss is nan at step")]
)
def test_a_model_without_finite_numbers_is_refused(
    trained: tuple[Path, pl.DataFrame], tmp_path: Path, steps: int, reason: str
) -> None:
    bundle, past = trained
    data = shop(tmp_path, past, recall(range(10_100, 11_001, 25), 6000, "train"))
    wreck = replace(CONFIG, stages=(DpoStage("prefer", steps, batch=8, lr=1e30, warmup=0.0),))
    row = follow(wreck, bundle, data, tmp_path / "out")[-1]
    assert not row.published and row.numbers is None and reason in row.reason


def test_a_killed_stream_ends_with_the_same_bundle(trained: tuple[Path, pl.DataFrame], tmp_path: Path) -> None:
    bundle, past = trained
    data = shop(tmp_path, past, recall(range(10_100, 11_001, 25), 6000, "train"))
    recipe = tmp_path / "stream.toml"
    recipe.write_text(
        "threads = 1\nwindow = 1000\ndelay = 500\nprobe = 30\ngate = { hr = 1.0, valid = 1.0, ndcg = 1.0, kl = 1e9 }\n"
        '[[stages]]\nname = "prefer"\nkind = "dpo"\nsteps = 4\nbatch = 8\nlr = 1e-3\n'
        '[[stages]]\nname = "policy"\nkind = "tpma"\nsteps = 20\nbatch = 2\ngroup = 2\nlr = 1e-4\n'
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "training.stream", str(bundle), "--data", str(data), "--out", str(out)]
    process = subprocess.Popen([*command, "--recipe", str(recipe)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(out.glob("work/stage-policy-*/log.jsonl")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert len(read_ledger(out)) == 1 and (out / CURRENT).resolve() == bundle.resolve()
    (out / "0001").mkdir()  # a kill between the bundle and its line in the ledger
    (out / "0001" / "junk").write_bytes(b"half")

    config = read_toml(StreamConfig, recipe)
    continued = follow(config, bundle, data, out)
    whole = follow(config, bundle, data, tmp_path / "whole")
    assert [row.published for row in whole] == [True, True]
    lines = [[orjson.loads(orjson.dumps(row)) for row in rows] for rows in (continued, whole)]
    assert lines[0] == lines[1]
    assert open_bundle(out / "0001").manifest.files == open_bundle(tmp_path / "whole" / "0001").manifest.files
    assert not (out / "work").exists() and sorted(p.name for p in out.iterdir()) == [
        "0001",
        CURRENT,
        LEDGER,
    ]
    (out / CURRENT).unlink()  # a kill before the link was moved
    assert follow(config, bundle, data, out) == read_ledger(out)
    assert (out / CURRENT).readlink() == Path("0001")


def test_settings_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "stream.toml"
    for text, fault in {
        "replay = 0.2": "replay: 0.2, expected a share of at least 0.3 and below 1",
        "replay = 1.0": "replay: 1.0, expected a share of at least 0.3 and below 1",
        "window = 0": "window: 0, expected at least 1",
        "windows = 3": "windows: unknown key",
        "[gate]\nhr10 = 0.1": "gate.hr10: unknown key",
        '[[stages]]\nname = "s"\nkind = "sft"\nsteps = 1': "stages\\[0\\].kind: 'sft', expected one of dpo, tpma, grpo",
        '[[stages]]\nname = "s"\nsteps = 1\nsource = "model"': "stages.s.source: 'model', expected 'log'",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"recipe .*{path.name}: {fault}"):
            read_toml(StreamConfig, path)
    shipped = Path(__file__).parents[1] / "recipes" / "stream.toml"
    assert read_toml(StreamConfig, shipped) == StreamConfig()


def test_a_ledger_goes_with_its_bundle(trained: tuple[Path, pl.DataFrame], tmp_path: Path) -> None:
    bundle, past = trained
    data, ledger = (
        shop(tmp_path, past, recall(range(10_100, 10_201, 25), 6000, "train")),
        tmp_path / "out" / LEDGER,
    )
    (first,) = follow(CONFIG, bundle, data, tmp_path / "out")  # no whole window yet
    lines = ledger.read_bytes()
    ledger.write_bytes(lines.replace(first.model_version.encode(), b"another"))
    with pytest.raises(ConfigError, match="began with model another, not with"):
        follow(CONFIG, bundle, data, tmp_path / "out")
    with alone(tmp_path / "out"), pytest.raises(ConfigError, match="out: is in use by another process"):
        follow(CONFIG, bundle, data, tmp_path / "out")
    ledger.write_bytes(lines + b'{"window": 1')
    with pytest.raises(DataError, match="line 2"):
        follow(CONFIG, bundle, data, tmp_path / "out")


def test_the_command_explains_itself_and_says_faults_in_one_line(
    trained: tuple[Path, pl.DataFrame],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, _ = trained
    write_tables(Tables(items()), tmp_path / "data")

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["stream", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        shown = capsys.readouterr()
        return int(stopped.value.code or 0), shown.out + shown.err

    assert "Usage:" in command("-h")[1]
    places = [str(bundle), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    status, shown = command(*places)
    assert status == 2 and "holds no page views, expected the log that the bundle is to follow" in shown
    status, shown = command(*places, "--recipe", str(tmp_path / "none.toml"))
    assert status == 2 and shown.startswith("stream: recipe") and not (tmp_path / "out").exists()
