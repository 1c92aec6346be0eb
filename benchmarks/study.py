"""Studies on one simulated marketplace, several training seeds, paired intervals: `ablation` of every method of the
paper, and `history` of how a long history enters the prompt.

`python -m benchmarks.study [--study NAME] [--seeds 5] [--rows NAME,NAME] [--out DIR]` trains and measures what is not
measured yet and writes the report; stopped at any moment, the same command goes on, and the command started twice
shares the seeds (a run takes one core). Each run is kept as `STUDY.runs/ROW-SEED.json` with the rank of every clicked
item, so that a report needs no training: `python -m benchmarks.study --report`.

Differences are paired by seed and page view; the bootstrap draws seeds and page views. Rows trained with the same
number of steps cost different amounts; the controls `cot_x2` and `cot_x4` give the plain loss the steps instead.
Legend: U clicked items.
"""

import argparse
import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import orjson
import torch

from benchmarks.study_report import Outcome, write_report
from onesearch.arrays import write_atomically
from onesearch.bundle import Bundle, open_bundle
from onesearch.hardware import hardware
from onesearch.model import TorchDecoder, open_model
from onesearch.progress import track
from onesearch.search import Searcher, SearchOptions
from onesearch.sequence import SequenceConfig, UidMode
from training.codebooks import CodebookConfig
from training.embedder import EmbedderConfig
from training.logged import Units, clicked_units, query_slices
from training.marketplace import simulate, write_truth
from training.metrics import item_rank
from training.oracle import oracle_keywords
from training.pipeline import Work, train_bundle
from training.recipe import DataConfig, ModelShape, Recipe, TokenizerConfig
from training.sessions import PageView, page_views
from training.stages import DpoStage, GrpoStage, SdftStage, SftStage, TpmaStage
from training.tables import Tables, load_tables, write_tables

ITEMS, USERS, SESSIONS, WORLD_SEED = 2_000, 500, 14_000, 7
TOP, WIDTH = 10, 128
_DIGITS = "0123456789A"  # a rank of 1 to TOP, 0 for absent
_ALIGN = ("query_to_sid", "sid_to_query", "title_to_sid", "sid_to_title", "query_to_category", "sid_to_category")
_COT = ("query_to_keywords", "query_sid_to_keyword_sid", "user_to_keywords", "user_to_keyword_sid")
_COOCCUR = ("query_sid_to_item_sid", "item_sid_to_query_sid", "query_to_title", "title_to_query")
_BATCH, _RATE = 128, 2e-3
Stage = SftStage | SdftStage | DpoStage | GrpoStage | TpmaStage
_STEPS = {"align": 120, "cooccur": 80, "search": 500, "prefer": 40}


@dataclass(frozen=True)
class Row:
    """One system: its stages, and whether its prompts show keywords when it is measured. tables: of the paper.

    prompt, data and model: what its recipe says differently under [sequence], [data] and [model].
    """

    name: str
    label: str
    stages: tuple[Stage, ...]
    tables: tuple[str, ...]
    served: bool = False
    prompt: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)


def ablation() -> dict[str, Row]:
    """All systems of the paper by name."""
    plain, cot = _first(()), _first(_COT)
    search = _search
    sdft: dict[str, Any] = {"alpha_r": 0.5, "epsilon": 0.2, "gamma": 3.0}
    full = (*cot, _distil(2, **sdft))
    v1 = (*plain, search())
    user = ("user",)
    found = [
        Row("v1", "V1 baseline", v1, ("3", "5", "6", "8", "user")),
        Row(
            "no_history", "no recent queries and items", v1, user, prompt={"recent_queries": 0, "recent_items": 0}
        ),
        *(
            Row(f"uid_{mode}", f"+ user id, {mode}", v1, user, prompt={"uid": mode, "max_ids": 96})
            for mode in get_args(UidMode)
            if mode != "off"
        ),
        Row("cold_default", "+ history of the query for users without", v1, user, data={"cold_default": True}),
        Row("cot", "+ CoT tasks", (*cot, search()), ("3", "4", "5", "8")),
        Row("cot_x2", "+ CoT tasks, 2x steps (control)", (*cot, search(steps=2)), ("controls",)),
        Row("cot_x4", "+ CoT tasks, 4x steps (control)", (*cot, search(steps=4)), ("controls",)),
        Row(
            "cot_x4_aligned",
            "+ CoT tasks, 4x steps + PARS + TPMA-GRPO",
            (*cot, search(steps=4), _dpo(), _policy(TpmaStage)),
            ("controls",),
        ),
        Row(
            "rag",
            "+ RAG (served keywords in training and prompt)",
            (*cot, search("search_served")),
            ("3", "7"),
            True,
        ),
        Row("sd_printed", "+ self-distillation as printed (kw_mix 0)", (*cot, _distil(kw_mix=0.0)), ("5",)),
        Row("sd", "+ self-distillation, teacher taught", (*cot, _distil()), ("3", "5", "7", "8")),
        Row(
            "sd_x2",
            "+ self-distillation, as many keyword-free steps as + CoT",
            (*cot, _distil(2)),
            ("5", "controls"),
        ),
        Row("sd_teacher", "the same, prompts with served keywords (T)", (*cot, _distil()), ("7",), True),
        Row("sd_rdrop", "+ SD + R-Drop", (*cot, _distil(alpha_r=0.5)), ("5",)),
        Row("sd_fgm", "+ SD + R-Drop + FGM", (*cot, _distil(alpha_r=0.5, epsilon=0.2)), ("5",)),
        Row("sdft", "+ SD + R-Drop + FGM + focal (full SDFT)", full, ("5",)),
        Row("focal", "CoT + focal only", (*cot, _distil(mode="off", kw_mix=0.0, gamma=3.0)), ("5",)),
        Row(
            "focal_balanced",
            "CoT + class-balanced focal only",
            (*cot, _distil(mode="off", kw_mix=0.0, gamma=3.0, class_balance=0.999)),
            ("5",),
        ),
        Row("rdrop", "CoT + R-Drop only", (*cot, _distil(mode="off", kw_mix=0.0, alpha_r=0.5)), ("5",)),
        Row("joint", "joint distillation", (*cot, _distil(mode="joint", kw_mix=0.0)), ("8",)),
        Row("ema", "EMA teacher", (*cot, _distil(mode="ema", ema_decay=0.99)), ("8",)),
        Row("token", "special token", (*cot, _distil(mode="token")), ("8",)),
        Row("codi", "CODI", (*cot, _distil(mode="codi")), ("8",)),
        Row("codi_projection", "CODI + projection", (*cot, _distil(mode="codi", projection=True)), ("8",)),
        Row("pars", "full SDFT + PARS (listwise DPO)", (*full, _dpo()), ("5", "6")),
        Row("grpo", "full SDFT + GRPO", (*full, _policy(GrpoStage)), ("5", "6")),
        Row("tpma", "full SDFT + TPMA-GRPO", (*full, _policy(TpmaStage)), ("5", "6")),
        Row("v2", "full V2: SDFT + PARS + TPMA-GRPO", (*full, _dpo(), _policy(TpmaStage)), ("4", "5", "6")),
    ]
    return {row.name: row for row in found}


def history() -> dict[str, Row]:
    """The V1 baseline by how its prompts show the long history."""
    stages, table = (*_first(()), _search()), ("history",)
    found = [
        Row("v1", "V1 baseline: a mean with behaviour gates", stages, table),
        Row("qformer", "a Q-Former over behaviours and levels", stages, table, model={"history": "qformer"}),
        Row("no_vectors", "no history vectors", stages, table, prompt={"history_vectors": False}),
    ]
    return {row.name: row for row in found}


STUDIES = {"ablation": ablation, "history": history}


def _first(cot: tuple[str, ...]) -> tuple[SftStage, ...]:
    """Stages 1 and 2. The keyword tasks share the steps of stage 1: every row takes the same number."""
    return (
        SftStage(name="align", steps=_STEPS["align"], batch=_BATCH, lr=_RATE, tasks=(*_ALIGN, *cot)),
        SftStage(name="cooccur", steps=_STEPS["cooccur"], batch=_BATCH, lr=_RATE, tasks=_COOCCUR),
    )


def _search(task: str = "search", steps: int = 1) -> SftStage:
    return SftStage(name="search", steps=steps * _STEPS["search"], batch=_BATCH, lr=_RATE, mixture={task: 1.0})


def _distil(times: int = 1, **terms: Any) -> SdftStage:
    """Half of the steps of the default show keywords and teach the teacher; `times` makes up for them."""
    steps = times * _STEPS["search"]
    return SdftStage(name="distil", steps=steps, batch=_BATCH, lr=_RATE, mixture={"search": 1.0}, **terms)


def _dpo() -> DpoStage:
    return DpoStage(name="pars", steps=_STEPS["prefer"], batch=32, lr=1e-4)


def _policy(kind: type[GrpoStage]) -> GrpoStage:
    return kind(name="policy", steps=_STEPS["prefer"], batch=16, lr=1e-4)


def recipe_of(row: Row, seed: int) -> Recipe:
    """The recipe of one run."""
    return Recipe(
        name=row.name,
        seed=seed,
        threads=1,
        golden_examples=2,
        data=DataConfig(anonymous_share=0.1, keywords="oracle", **row.data),
        tokenizer=TokenizerConfig(vocab_size=2_000),
        embedder=EmbedderConfig(buckets=8_192, svd_dim=64, dim=32, temperature=0.07, epochs=1),
        codebooks=CodebookConfig(sizes=(32, 16, 16, 32, 32)),
        sequence=SequenceConfig(
            **{"max_ids": 80, "recent_queries": 2, "recent_items": 4, "keywords": 5, **row.prompt}
        ),
        model=ModelShape(d_model=64, encoder_layers=1, decoder_layers=2, heads=4, ffn=256, **row.model),
        stages=row.stages,
    )


@dataclass(frozen=True)
class World:
    """The marketplace of the study and what is asked of every system: the page views of the last tenth with a click."""

    data: Path

    @classmethod
    def at(cls, folder: Path) -> "World":
        """Simulate it, unless it is there."""
        data = folder / "data"
        if not (data / "truth").exists():
            market = simulate(ITEMS, USERS, SESSIONS, WORLD_SEED)
            write_tables(market.tables, data, "parquet")
            write_truth(market, data / "truth")
        return cls(data)

    @cached_property
    def tables(self) -> Tables:
        return load_tables(self.data)

    @cached_property
    def views(self) -> list[PageView]:
        return page_views(self.tables)

    @cached_property
    def asked(self) -> list[PageView]:
        return [view for view in self.views if view.split != "train" and view.clicked]

    def outcome_of(self, ranks: str) -> Outcome:
        """Per-page-view values of one run from the ranks of its clicked items."""
        digits = np.asarray([_DIGITS.index(d) for d in ranks], dtype=np.int64)
        return Outcome(digits, self.units.view, self.masks)

    @cached_property
    def units(self) -> Units:
        """The clicked items; their rows are of no use here and are not those of any bundle."""
        return clicked_units(self.asked, lambda item: item)

    @cached_property
    def masks(self) -> Mapping[str, npt.NDArray[np.bool_]]:
        train = [view for view in self.views if view.split == "train"]
        return query_slices(self.asked, self.units, train)[0]


def measure(bundle: Bundle, world: World, served: bool, recipe: Recipe) -> str:
    """Rank of every clicked item in the top TOP, as one digit each."""
    searcher = Searcher(bundle, TorchDecoder(open_model(bundle.path), bundle.renderer))
    options = SearchOptions(limit=TOP, width=WIDTH)
    contexts = [view.context for view in world.asked]
    if served:
        provide = oracle_keywords(
            world.data, world.tables.items, recipe.data.keyword_recall, recipe.data.keyword_noise, recipe.seed
        )
        contexts = [replace(c, keywords=k.serve) for c, k in zip(contexts, provide(world.asked), strict=True)]
    digits: list[str] = []
    for view, context in zip(world.asked, track(contexts, "measure"), strict=True):
        found = searcher.search(context, options)
        ids = found.catalog.ids_at(found.rows)
        digits += [_DIGITS[item_rank(ids, item)] for item in view.clicked]
    return "".join(digits)


def run(row: Row, seed: int, world: World, work: Path) -> dict[str, Any]:
    """Train and measure one row with one seed."""
    recipe, out = recipe_of(row, seed), work / f"{row.name}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    train_bundle(recipe, world.data, out, Work(work / f"stages-{seed}"))
    trained = time.perf_counter()
    ranks = measure(open_bundle(out), world, row.served, recipe)
    shutil.rmtree(out)
    return {
        "row": row.name,
        "seed": seed,
        "fingerprint": fingerprint(row),
        "train_seconds": round(trained - started, 1),
        "measure_seconds": round(time.perf_counter() - trained, 1),
        "ranks": ranks,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "torch": torch.__version__,
    }


def fingerprint(row: Row) -> str:
    """What a run depends on besides the code and its seed."""
    recipe = _said(replace(recipe_of(row, 0), name=""))
    plain = json.dumps([recipe, row.served, ITEMS, USERS, SESSIONS, WORLD_SEED, TOP, WIDTH], sort_keys=True)
    return sha256(plain.encode()).hexdigest()[:12]


def _said(value: Any) -> Any:
    """A recipe as plain values without what it leaves at its default: a key that is new makes no run another."""
    if isinstance(value, (tuple, list)):
        return [_said(item) for item in value]
    if not is_dataclass(value):
        return value
    said = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "kind"}
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(value)}
    return {type(value).__name__: {name: _said(v) for name, v in said.items() if v != defaults[name]}}


def known_runs(folder: Path, chosen: Mapping[str, Row]) -> dict[tuple[str, int], dict[str, Any]]:
    """Runs that were made with the rows as they are now."""
    runs = [orjson.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
    return {
        (r["row"], r["seed"]): r
        for r in runs
        if r["row"] in chosen and r["fingerprint"] == fingerprint(chosen[r["row"]])
    }


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may work on a seed; another one's claim ends with its life."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def main() -> None:
    """Console entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="ablation")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", help="comma-separated names; default all")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder for data and stages")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/studies"))
    parser.add_argument("--report", action="store_true", help="only write the report of the runs there are")
    arguments = parser.parse_args()
    everything = STUDIES[arguments.study]()
    names = arguments.rows.split(",") if arguments.rows else list(everything)
    if unknown := sorted(set(names) - set(everything)):
        parser.error(f"rows {', '.join(unknown)}: unknown, expected some of {', '.join(everything)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    store = arguments.out / f"{arguments.study}.runs"
    store.mkdir(exist_ok=True)
    world = World.at(arguments.work)
    if not arguments.report:
        for seed in range(1, arguments.seeds + 1):
            with claimed(arguments.work / f"seed-{seed}.lock") as mine:
                if mine:
                    _run_seed([everything[name] for name in names], seed, world, arguments.work, store)
    known = known_runs(store, everything)
    outcomes: dict[str, dict[int, Outcome]] = {}
    for (name, seed), result in known.items():
        outcomes.setdefault(name, {})[seed] = world.outcome_of(result["ranks"])
    write_report(arguments.out, arguments.study, everything, known, outcomes, _facts(world))


def _run_seed(chosen: Sequence[Row], seed: int, world: World, work: Path, store: Path) -> None:
    """Make the runs of one seed that are missing; its rows share their first stages."""
    known = known_runs(store, {row.name: row for row in chosen})
    for row in track([row for row in chosen if (row.name, seed) not in known], f"study, seed {seed}"):
        result = run(row, seed, world, work)
        write_atomically(store / f"{row.name}-{seed}.json", orjson.dumps(result))


def _facts(world: World) -> dict[str, Any]:
    return {
        "world": f"{ITEMS} items, {USERS} users, {SESSIONS} sessions, seed {WORLD_SEED}",
        "training page views": sum(view.split == "train" for view in world.views),
        "page views asked": len(world.asked),
        "clicked items": len(world.units.view),
        "beam": WIDTH,
        "steps": _STEPS,
        "batch": _BATCH,
    }


if __name__ == "__main__":
    main()
