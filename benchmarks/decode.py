"""One whole search, prompt to best SIDs, against what a user could pick instead, with the same weights.

`python -m benchmarks.decode --shape demo|bart-base [--bundle DIR] [--items N] [--hf-runs N] [--json]`

*demo* is the model and trie of an exported bundle; *bart-base* has 6 + 6 layers, width 768, feed-forward 3072,
12 heads, 50,265 text tokens and 1M items, with random weights. A search reads the prompt (128 tokens for bart-base) and
returns the best 50 of 512 beams; batch 1, two threads for everybody:

- ours: ONNX Runtime graphs in fp32, prefill graph and native steps in int8, both under the trie;
- `transformers.generate` with a `prefix_allowed_tokens_fn` over the same trie;
- CTranslate2 in float32 and int8, unconstrained: it has no per-beam constraint, so this is its best case.

Before anything is timed the fp32 search must equal a beam search written with transformers' BART and full forwards:
same 50 SIDs, scores within 1e-4. Times are medians in milliseconds, with [lowest, highest]. `early_stop` and the score
`legal` are timed against the default too, after their results were compared with the search that does not stop early.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BartForConditionalGeneration

import decoder
from benchmarks import peers
from benchmarks.floor import multiply_adds, peak_fp32, peak_int8
from benchmarks.trie import SIZES, catalog, prefix_dictionary, timed
from model_export import quantise, to_onnx
from onesearch.bundle import open_bundle
from onesearch.decode import BeamConfig, BeamResult, beam_search
from onesearch.hardware import hardware
from onesearch.model import OneSearchModel, open_model
from onesearch.model_config import ModelConfig
from onesearch.runtime import PREFILL_FILE, STEP_FILE, Decoder, open_decoder
from onesearch.search import score_gap
from onesearch.sequence import Prompt
from trie import SidTrie

WIDTH, TOP_N, THREADS = 512, 50, 2
CONFIG = BeamConfig(width=WIDTH, top_n=TOP_N)
MODES = {
    **{f"early_stop_{rows}": replace(CONFIG, early_stop=rows) for rows in (64, 128, 256)},
    "legal": replace(CONFIG, score="legal"),
    "legal_early_stop_128": replace(CONFIG, score="legal", early_stop=128),
}
"""Other ways to search."""
TEXT_TOKENS, PROMPT_TOKENS = 50_265, 128  # of BART base
Record = Callable[[str, list[float]], None]
"""Takes the times of a name, in milliseconds."""


@dataclass(frozen=True)
class Case:
    """A model with its trie and one prompt without history, so that every engine reads the same input."""

    model: OneSearchModel
    trie: SidTrie
    prompt: Prompt


def demo_case(folder: Path, items: int | None = None) -> Case:
    """The first golden example of a bundle, with an empty history; items: under a trie of so many random items."""
    bundle = open_bundle(folder, graphs=False)
    ids = np.asarray(bundle.examples[0].ids)
    ids = ids[~np.isin(ids, bundle.renderer.history_ids)]
    model, trie = open_model(folder), bundle.trie
    if items is not None:
        trie = SidTrie.build(catalog(items, sizes=trie.sizes), trie.sizes)
    return Case(model, trie, Prompt(ids, np.zeros(bundle.renderer.history_shape, np.float32)))


def bart_base_case(items: int) -> Case:
    """Random weights, with logits spread far enough that beams differ."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=TEXT_TOKENS + sum(SIZES),
        history_dim=64,
        sid_sizes=SIZES,
        sid_first_id=TEXT_TOKENS,
        pad=1,
        bos=0,
        eos=2,
        history_ids=(4, 5, 6),
        d_model=768,
        encoder_layers=6,
        decoder_layers=6,
        heads=12,
        ffn=3072,
        max_positions=PROMPT_TOKENS,
    )
    model = OneSearchModel(config).eval()
    ids = np.random.default_rng(0).integers(10, TEXT_TOKENS, PROMPT_TOKENS)
    return Case(
        model, SidTrie.build(catalog(items), SIZES), Prompt(ids, np.zeros(config.history_shape, np.float32))
    )


def reference_search(case: Case, bart: BartForConditionalGeneration) -> BeamResult:
    """Plain beam search: transformers' BART over every whole prefix, no cache, children asked one by one."""
    sids, trie = case.model.config.sids, case.trie
    ids = torch.from_numpy(case.prompt.ids)[None]
    codes, scores = np.empty((1, 0), np.uint16), np.zeros(1, np.float32)
    with torch.inference_mode():
        memory = bart.model.encoder(ids).last_hidden_state
        for level in range(trie.levels):
            start = np.full((len(codes), 1), case.model.config.bos)
            inputs = torch.from_numpy(np.concatenate([start, sids.token_ids(codes)], axis=1))
            logp = []
            for rows in torch.split(inputs, 64):
                hidden = bart.model.decoder(
                    rows, encoder_hidden_states=memory.expand(len(rows), -1, -1), use_cache=False
                ).last_hidden_state[:, -1]
                logits = bart.lm_head(hidden) + bart.final_logits_bias
                logp.append(torch.log_softmax(logits[:, slice(*sids.level_range(level))], dim=1).numpy())
            table = np.concatenate(logp)
            legal = [trie.children(prefix) for prefix in codes.tolist()]
            beams = np.repeat(np.arange(len(codes)), [len(c) for c in legal])
            last = np.concatenate(legal)
            total = scores[beams] + table[beams, last]
            best = np.sort(np.argsort(-total, kind="stable")[: WIDTH if level < trie.levels - 1 else TOP_N])
            codes, scores = np.column_stack([codes[beams[best]], last[best]]).astype(np.uint16), total[best]
    order = np.argsort(-scores, kind="stable")
    return BeamResult(codes[order], scores[order], np.zeros(len(order), np.int64), ())


def measure(case: Case, hf_runs: int, repeats: int) -> dict[str, Any]:
    """All numbers of one case."""
    config, trie = case.model.config, case.trie
    bart = peers.as_bart(case.model)
    row: dict[str, Any] = {"hardware": hardware(), "threads": THREADS, "kernels": decoder.kernels()[0]}
    row |= {"sids": trie.num_sids, "prompt_tokens": len(case.prompt.ids), "vocabulary": config.vocab_size}

    def record(name: str, times: list[float]) -> None:
        row[name] = round(statistics.median(times), 2)
        row[f"{name}_range"] = [round(min(times), 2), round(max(times), 2)]
        row[f"{name}_runs"] = len(times)

    with tempfile.TemporaryDirectory() as name:
        graphs = Path(name)
        to_onnx.export_prefill(case.model, graphs / PREFILL_FILE)
        to_onnx.export_step(case.model, graphs / STEP_FILE)
        quantise.quantise(case.model, graphs)
        fp32, int8 = (open_decoder(graphs, config.sids, config.bos, THREADS, p) for p in ("fp32", "int8"))
        expected, exact, rough = reference_search(case, bart), search(case, fp32), search(case, int8)
        row["score_gap_fp32"] = score_gap(expected, exact)
        row["same_top_n"] = bool(row["score_gap_fp32"] <= 1e-4)
        if not row["same_top_n"]:
            raise SystemExit(f"fp32 differs from the reference by {row['score_gap_fp32']}; nothing was timed")
        row["overlap_top_10_int8"], row["overlap_top_50_int8"] = (
            overlap(exact, rough, 10),
            overlap(exact, rough, 50),
        )
        for precision, ours in (("fp32", fp32), ("int8", int8)):
            record(f"ours_{precision}_ms", timed(partial(search, case, ours), repeats))
            record(f"prefill_{precision}_ms", timed(partial(ours.start, case.prompt), repeats))
            row |= modes(case, ours, precision, repeats, record)
        row |= step_times(case, int8)

    macs = multiply_adds(config, len(case.prompt.ids), (1, *rough.beams[:-1]))
    peaks = {"int8": peak_int8(THREADS), "fp32": peak_fp32(THREADS)}
    row |= {"multiply_adds": macs, **{f"peak_{p}_gops": round(2e-9 * peak, 1) for p, peak in peaks.items()}}
    for suffix, precision in (("", "int8"), ("_fp32", "fp32")):
        floor = macs / peaks[precision] * 1e3
        row[f"floor{suffix}_ms"] = round(floor, 2)
        row[f"ratio_floor_{precision}"] = round(row[f"ours_{precision}_ms"] / floor, 2)
    peer_times(case, bart, hf_runs, repeats, record)
    for ratio, ours_ms, other_ms in (
        ("ratio_hf_fp32", "ours_fp32_ms", "hf_ms"),
        ("ratio_hf_int8", "ours_int8_ms", "hf_ms"),
        ("ratio_ct2_fp32", "ours_fp32_ms", "ct2_fp32_ms"),
        ("ratio_ct2_int8", "ours_int8_ms", "ct2_int8_ms"),
    ):
        if other_ms in row:
            row[ratio] = round(row[other_ms] / row[ours_ms], 1)
    return row


def search(case: Case, ours: Decoder, config: BeamConfig = CONFIG) -> BeamResult:
    """One search, prompt to SIDs."""
    return beam_search(ours.start(case.prompt), case.trie, config)


def modes(case: Case, ours: Decoder, precision: str, repeats: int, record: Record) -> dict[str, int]:
    """Time every other way to search; the rows each asks of the model. Ends the program where an early stop changes
    the best SIDs or moves a score by more than 1e-4."""
    rows = {}
    for name, config in {"default": CONFIG, **MODES}.items():
        whole, step = search(case, ours, replace(config, early_stop=0)), ours.start(case.prompt)
        asked: list[int] = []

        def counted(codes: Any, parents: Any, step: Any = step, asked: list[int] = asked) -> Any:
            asked.append(len(codes))
            return step(codes, parents)

        if not (gap := score_gap(whole, beam_search(counted, case.trie, config))) <= 1e-4:
            raise SystemExit(f"{name} in {precision} differs from the search without a stop by {gap}")
        rows[f"{name}_{precision}_rows"] = sum(asked)
        if name in MODES:
            record(f"{name}_{precision}_ms", timed(partial(search, case, ours, config), repeats))
    return rows


def step_times(case: Case, ours: Decoder, repeats: int = 9) -> dict[str, Any]:
    """Lowest milliseconds of each level's step, and of all the rest of a search: trie, selection, Python."""
    steps: list[list[float]] = []
    rest: list[float] = []
    for _ in range(repeats):
        step = ours.start(case.prompt)
        times: list[float] = []

        def clocked(codes: Any, parents: Any, step: Any = step, times: list[float] = times) -> Any:
            start = time.perf_counter()
            logits = step(codes, parents)
            times.append((time.perf_counter() - start) * 1e3)
            return logits

        start = time.perf_counter()
        beam_search(clocked, case.trie, CONFIG)
        rest.append((time.perf_counter() - start) * 1e3 - sum(times))
        steps.append(times)
    return {
        "steps_int8_ms": [round(min(level), 2) for level in zip(*steps, strict=True)],
        "trie_ms": round(min(rest), 2),
    }


def overlap(a: BeamResult, b: BeamResult, top: int) -> float:
    """Share of the best `top` SIDs in common."""
    first, second = ({tuple(code) for code in r.codes[:top].tolist()} for r in (a, b))
    return len(first & second) / len(first)


def peer_times(
    case: Case,
    bart: BartForConditionalGeneration,
    hf_runs: int,
    repeats: int,
    record: Record,
) -> None:
    """Time CTranslate2 and, if hf_runs, `generate`."""
    config, levels = case.model.config, case.trie.levels
    ids = torch.from_numpy(case.prompt.ids)
    with tempfile.TemporaryDirectory() as name:
        folder = peers.convert_for_ctranslate2(bart, Path(name))
        for precision, compute_type in (("int8", "int8"), ("fp32", "float32")):
            call = peers.ct2_search(folder, compute_type, ids.tolist(), WIDTH, TOP_N, levels, THREADS)
            record(f"ct2_{precision}_ms", timed(call, repeats, warm_up=1))
    if hf_runs:
        allowed, first = prefix_dictionary(case.trie.sids(), config.sid_sizes), config.sid_first_id
        shifted = {prefix: [first + code for code in codes] for prefix, codes in allowed.items()}

        def allow(batch: int, sent: torch.Tensor) -> list[int]:
            return shifted[tuple(token - first for token in sent[1:].tolist())]

        torch.set_num_threads(THREADS)
        call = peers.hf_search(bart, ids, WIDTH, TOP_N, levels, allow)
        record("hf_ms", timed(call, hf_runs, warm_up=int(hf_runs > 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time whole searches against transformers and CTranslate2.")
    parser.add_argument("--shape", choices=["demo", "bart-base"], default="demo")
    parser.add_argument("--bundle", type=Path, default=Path("demo/bundle"), help="the bundle of shape demo")
    parser.add_argument(
        "--items", type=int, help="items of a random catalog [default: demo its own, bart-base 1000000]"
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of everything but transformers")
    parser.add_argument(
        "--hf-runs", type=int, default=3, help="timed runs of transformers, after one warm-up; 0 skips"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if arguments.shape == "demo":
        case = demo_case(arguments.bundle, arguments.items)
    else:
        case = bart_base_case(arguments.items or 1_000_000)
    row = {"shape": arguments.shape} | measure(case, arguments.hf_runs, arguments.repeats)
    print(json.dumps(row) if arguments.json else "\n".join(f"{k:>24}  {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
