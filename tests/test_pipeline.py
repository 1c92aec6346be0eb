"""The straight line on a small marketplace: killed and continued, skipped when done, exact in the end."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from test_sentence_encoder import tiny_encoder

from onesearch.bundle import open_bundle
from onesearch.context import SearchContext
from onesearch.embedder import OnnxEmbedder
from onesearch.errors import BundleError, ConfigError
from onesearch.model import TorchDecoder, open_model
from onesearch.search import Searcher, SearchOptions
from training.loop import read_log
from training.marketplace import simulate
from training.pipeline import Work, train_bundle
from training.recipe import load_recipe
from training.tables import write_tables
from training.taqu import make_keywords

RECIPE = """
name = "tiny"
threads = 1
checkpoint_every = 2
golden_examples = 3
[data]
bootstrap = {bootstrap}
anonymous_share = 0.3
cold_default = true
[sequence]
uid = "vote"
[embedder]
buckets = 2048
svd_dim = 16
dim = 8
epochs = 1
finetune_epochs = 1
[codebooks]
sizes = [8, 8, 8, 8, 8]
iterations = 4
[tokenizer]
vocab_size = 600
[model]
d_model = 16
heads = 2
ffn = 16
encoder_layers = 1
decoder_layers = 1
[[stages]]
name = "align"
steps = 4
batch = 8
mixture = {{ {tasks} }}
[[stages]]
name = "search"
steps = {steps}
batch = 8
mixture = {{ search = 1.0 }}
kw_mix = 0.5
[[stages]]
name = "distil"
kind = "sdft"
steps = 3
batch = 8
tasks = ["search", "items_to_next_item", "query_to_keywords", "query_sid_to_keyword_sid", "user_to_keyword_sid"]
mode = "ema"
alpha_r = 0.5
epsilon = 0.1
[[stages]]
name = "prefer"
kind = "dpo"
source = "model"
prompts = 20
candidates = 16
steps = 3
batch = 8
[[stages]]
name = "reward"
kind = "tpma"
steps = 3
batch = 4
group = 4
constrained = true
logged_positive = true
beta_kl = 0.1
[stages.reward]
invalid = -1.0
"""
STEPS = {"align": 4, "search": 6, "distil": 3, "prefer": 3, "reward": 3}
TASKS = (
    *("query_to_sid", "sid_to_query", "title_to_sid", "sid_to_title", "query_to_category", "title_to_category"),
    *("sid_to_category", "query_to_title", "title_to_query", "query_sid_to_item_sid", "item_sid_to_query_sid"),
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    write_tables(simulate(items=2000, users=20, sessions=400, seed=1).tables, folder)
    return folder


def recipe_file(folder: Path, steps: int = 6, bootstrap: bool = False) -> Path:
    tasks = ", ".join(f"{task} = 1.0" for task in TASKS)
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(bootstrap=str(bootstrap).lower(), tasks=tasks, steps=steps))
    return path


def work(root: Path) -> Work:
    root.mkdir(exist_ok=True)
    return Work(root)


def test_a_killed_run_continues_and_ends_with_the_same_bundle(shop: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, steps=60)
    command = [sys.executable, "-m", "training.pipeline", str(recipe), "--data", str(shop)]
    killed = [*command, "--out", str(tmp_path / "killed"), "--work", str(tmp_path / "work")]
    process = subprocess.Popen(killed, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "work").glob("stage-search-*/checkpoint/done.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "killed").exists()

    continued = train_bundle(load_recipe(recipe), shop, tmp_path / "killed", work(tmp_path / "work"))
    whole = train_bundle(load_recipe(recipe), shop, tmp_path / "whole", work(tmp_path / "other"))
    assert continued.files == whole.files

    again = train_bundle(load_recipe(recipe), shop, tmp_path / "again", work(tmp_path / "work"))
    assert again.files == whole.files
    logs = {folder.name.split("-")[1]: read_log(folder) for folder in (tmp_path / "work").glob("stage-*")}
    assert {name: len(rows) for name, rows in logs.items()} == STEPS | {"search": 60}
    assert {"hit", "dead_position", "item_advantage"} <= logs["reward"][0].keys()

    changed = recipe.read_text().replace("beta_kl = 0.1", "beta_kl = 0.2")
    recipe.write_text(changed)
    train_bundle(load_recipe(recipe), shop, tmp_path / "changed", work(tmp_path / "work"))
    folders = [folder.name.split("-")[1] for folder in (tmp_path / "work").glob("stage-*")]
    assert sorted(folders) == sorted([*STEPS, "reward"])  # the stages before are shared
    with pytest.raises(BundleError, match="exists already"):
        train_bundle(load_recipe(recipe), shop, tmp_path / "whole", work(tmp_path / "work"))


def test_a_shop_without_logs_trains_on_marked_pseudo_queries_and_answers_any_query(
    shop: Path, tmp_path: Path
) -> None:
    catalog_only = tmp_path / "catalog"
    catalog_only.mkdir()
    items = (shop / "items.jsonl").read_bytes().splitlines()[:300]
    (catalog_only / "items.jsonl").write_bytes(b"\n".join(items))
    with pytest.raises(ConfigError, match="hold no recall sessions"):
        train_bundle(load_recipe(recipe_file(tmp_path)), catalog_only, tmp_path / "b", work(tmp_path / "work"))
    recipe, keywords = load_recipe(recipe_file(tmp_path, bootstrap=True)), tmp_path / "keywords.jsonl"
    recipe = replace(recipe, data=replace(recipe.data, keywords="file", keyword_file=str(keywords)))
    out = tmp_path / "bundle"
    with pytest.raises(ConfigError, match=r"keywords\.jsonl is no file"):
        train_bundle(recipe, catalog_only, out, work(tmp_path / "work"))
    assert make_keywords(catalog_only, keywords, recipe=recipe)[0].missing == 0
    train_bundle(recipe, catalog_only, out, work(tmp_path / "work"))
    with keywords.open("ab") as file:  # another file is other training data
        file.write(keywords.read_bytes().splitlines(keepends=True)[-1].replace(b'"kw":[', b'"kw":["one",'))
    train_bundle(recipe, catalog_only, tmp_path / "other", work(tmp_path / "work"))
    assert len(list((tmp_path / "work").glob("stage-align-*"))) == 2

    bundle = open_bundle(out)
    assert bundle.manifest.metrics["sid"]["icr"] > 0
    searcher = Searcher(bundle, TorchDecoder(open_model(out), bundle.renderer))
    for golden in bundle.examples:
        result = searcher.search(golden.context, SearchOptions(limit=200, keywords=True))
        assert len(result.rows) == len(set(result.rows.tolist())) == 200
        assert (np.diff(result.scores) <= 0).all()


@pytest.mark.slow
def test_a_local_sentence_encoder_takes_the_place_of_the_hashed_embedder(shop: Path, tmp_path: Path) -> None:
    tiny_encoder(tmp_path / "encoder")
    catalog_only = tmp_path / "catalog"
    catalog_only.mkdir()
    (catalog_only / "items.jsonl").write_bytes(b"\n".join((shop / "items.jsonl").read_bytes().splitlines()[:200]))
    path = recipe_file(tmp_path, bootstrap=True)
    path.write_text(path.read_text().replace("[data]", f'[data]\nsentence_encoder = "{tmp_path / "encoder"}"'))
    out = tmp_path / "bundle"
    train_bundle(load_recipe(path), catalog_only, out, work(tmp_path / "work"))
    bundle = open_bundle(out)
    assert isinstance(bundle.encoder.embedder, OnnxEmbedder)
    searcher = Searcher(bundle, TorchDecoder(open_model(out), bundle.renderer))
    assert len(searcher.search(SearchContext("red shoes"), SearchOptions(limit=10)).rows) == 10
    assert not list((tmp_path / "work").glob(".*"))


def test_other_tables_are_never_taken_for_these(shop: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path))
    train_bundle(recipe, shop, tmp_path / "first", work(tmp_path / "work"))
    other = tmp_path / "other"
    other.mkdir()
    for path in shop.glob("*.jsonl"):
        lines = path.read_bytes().splitlines()
        if path.stem == "items":
            lines[0] = orjson.dumps(orjson.loads(lines[0]) | {"item_title": "a title of its own"})
        (other / path.name).write_bytes(b"\n".join(lines))
    train_bundle(recipe, other, tmp_path / "second", work(tmp_path / "work"))
    first, second = open_bundle(tmp_path / "first"), open_bundle(tmp_path / "second")
    assert first.manifest.catalog_version != second.manifest.catalog_version
    titles = b"".join(second.catalog.item_json(row) for row in range(second.catalog.num_items))
    assert b"a title of its own" in titles
