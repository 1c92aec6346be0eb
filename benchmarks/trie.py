"""The trie against the two ways people do this today, on the same catalog and the same logits.

`python -m benchmarks.trie [--items N] [--json]`

- *STATIC style*: a padded CSR index in PyTorch tensors, two threads, after the published method (arXiv 2602.22647):
  gather as many slots per beam as the level's widest node has children, mask, one top-k. The index is built by the
  published NumPy steps. The search uses the sparse kernel also where the published default reads its dense V×V
  tables, because that is faster on a CPU and exact.
- *HF style*: `transformers.PrefixConstrainedLogitsProcessor` with a dictionary of prefixes, as generative
  retrieval projects write it.

Every search runs all five levels with the log-softmax of each level, 512 beams, and returns the best 50. Results
must be equal before anything is timed. Times are medians in milliseconds, with [lowest, highest]. Ours and a baseline
take turns, because neither is steady over a day: a ratio is that of the medians of such rounds, `_lowest` that of the
round that was the worst for us.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PrefixConstrainedLogitsProcessor

from onesearch.decode import BeamConfig, beam_search
from onesearch.hardware import hardware
from trie import AnyMask, AnyTrie, Overlay, SidTrie

SIZES = (4096, 1024, 512, 256, 256)
OFFSETS = (0, 4096, 5120, 5632, 5888)
WIDTH, TOP_N = 512, 50

Codes = npt.NDArray[np.uint16]
Bank = list[npt.NDArray[np.float32]]
Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""SIDs [50, 5] and their scores [50]"""


def catalog(items: int, seed: int = 0, sizes: tuple[int, ...] = SIZES) -> Codes:
    """Skewed codes: Zipf(0.8) on every level, codebook order shuffled."""
    rng = np.random.default_rng(seed)
    columns = []
    for size in sizes:
        weight = 1 / np.arange(1, size + 1) ** 0.8
        columns.append(rng.permutation(size)[rng.choice(size, items, p=weight / weight.sum())])
    return np.stack(columns, axis=1).astype(np.uint16)


def logits(seed: int = 1) -> Bank:
    """Logits of each level for beam ranks 0 … 511. A beam's rank is its place in code order, known to all."""
    rng = np.random.default_rng(seed)
    rows = (1, *(WIDTH,) * (len(SIZES) - 1))
    return [rng.normal(0, 2, (k, size)).astype(np.float32) for k, size in zip(rows, SIZES, strict=True)]


@dataclass(frozen=True)
class StaticIndex:
    """STATIC's layout. State 0 is the end, state c + 1 the first code c, deeper prefixes follow level by level."""

    pairs: npt.NDArray[np.int32]
    """[token, next state] of every transition but the root's, then padding"""
    indptr: npt.NDArray[np.int32]
    widest: tuple[int, ...]
    """most children of any node, per level"""
    start_mask: npt.NDArray[np.bool_]
    dense_mask: npt.NDArray[np.bool_]
    """[V, V]: legal pairs of first and second code"""
    dense_states: npt.NDArray[np.int32]


def build_static(codes: Codes) -> StaticIndex:
    """The published sort-and-diff builder, step by step, with its default of two dense levels."""
    rows, vocab = codes[np.lexsort(codes.T[::-1])].astype(np.int32), max(SIZES)
    count, depth = rows.shape
    differs = rows[1:] != rows[:-1]
    first = np.full(count - 1, depth, dtype=np.int8)
    changed = differs.any(axis=1)
    first[changed] = differs[changed].argmax(axis=1)
    new = np.zeros((count, depth), dtype=bool)
    new[0] = True
    for level in range(depth):
        new[1:, level] = first <= level

    states = np.zeros((count, depth - 1), dtype=np.int32)
    states[:, 0] = rows[:, 0] + 1
    ranges = [(1, vocab + 1)]
    for level in range(1, depth - 1):
        begin = ranges[-1][1]
        ranges.append((begin, begin + int(new[:, level].sum())))
        states[new[:, level], level] = np.arange(*ranges[-1], dtype=np.int32)
        states[:, level] = np.maximum.accumulate(states[:, level])

    parents = np.concatenate([states[new[:, level], level - 1] for level in range(1, depth)])
    tokens = np.concatenate([rows[new[:, level], level] for level in range(1, depth)])
    ends = np.zeros(int(new[:, -1].sum()), dtype=np.int32)
    children = np.concatenate([*(states[new[:, level], level] for level in range(1, depth - 1)), ends])
    counts = np.bincount(parents, minlength=ranges[-1][1])
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    padding = np.zeros(vocab, dtype=np.int32)
    pairs = np.ascontiguousarray(np.vstack([np.append(tokens, padding), np.append(children, padding)]).T)

    start_mask = np.zeros(vocab, dtype=bool)
    start_mask[rows[:, 0]] = True
    dense_mask, dense_states = np.zeros((vocab, vocab), dtype=bool), np.zeros((vocab, vocab), dtype=np.int32)
    dense_mask[rows[:, 0], rows[:, 1]] = True
    dense_states[rows[:, 0], rows[:, 1]] = states[:, 1]
    widest = (int(start_mask.sum()), *(int(counts[begin:end].max()) for begin, end in ranges))
    return StaticIndex(pairs, indptr, widest, start_mask, dense_mask, dense_states)


class StaticStyle:
    """Beam search over STATIC's index with PyTorch tensors, its sparse kernel on every level but the first."""

    def __init__(self, index: StaticIndex, bank: Bank) -> None:
        self.pairs, self.indptr = torch.from_numpy(index.pairs), torch.from_numpy(index.indptr)
        self.start_mask, self.widest = torch.from_numpy(index.start_mask), index.widest
        self.bank = [torch.from_numpy(level) for level in bank]

    @torch.inference_mode()
    def __call__(self) -> Found:
        first = torch.where(self.start_mask, torch.log_softmax(self.bank[0][0], dim=-1), -torch.inf)
        scores, token = torch.topk(first, WIDTH)
        token, order = token.sort()  # every search here numbers its beams in code order, to share the logits
        scores, states, codes = scores[order], token + 1, token[:, None]
        for level, limit in enumerate(self.widest[1:], start=1):
            logp = torch.log_softmax(self.bank[level][: len(states)], dim=-1)
            start = self.indptr[states]
            offset = torch.arange(limit)
            slot = (start[:, None] + offset).clamp(max=len(self.pairs) - 1)
            pair = self.pairs[slot]
            token = pair[..., 0].long()
            valid = offset < (self.indptr[states + 1] - start)[:, None]
            legal = torch.where(valid, logp.gather(1, token.clamp(max=logp.shape[1] - 1)), -torch.inf)
            flat = (scores[:, None] + legal).view(-1)
            last = level + 1 == len(SIZES)
            scores, chosen = torch.topk(flat, TOP_N if last else WIDTH)
            if not last:
                chosen, order = chosen.sort()
                scores = scores[order]
            states = pair[..., 1].reshape(-1)[chosen].long()
            codes = torch.cat([codes[chosen // limit], token.view(-1)[chosen, None]], dim=1)
        return codes.numpy(), scores.numpy()


class HfStyle:
    """Beam search steps as `generate` does them: log-softmax, prefix processor, one top-k over beams × vocabulary.

    The vocabulary holds all levels; codes of other levels have logit -1e9, so the softmax is that of the level.
    """

    def __init__(self, codes: Codes, bank: Bank) -> None:
        self.allowed = prefix_dictionary(codes)
        self.vocab = sum(SIZES)
        self.bank = []
        for level, rows in enumerate(bank):
            full = torch.full((len(rows), self.vocab), -1e9)
            full[:, OFFSETS[level] : OFFSETS[level] + SIZES[level]] = torch.from_numpy(rows)
            self.bank.append(full)

    def allowed_tokens(self, batch_id: int, sent: torch.Tensor) -> list[int]:
        return self.allowed[tuple(sent.tolist())]

    @torch.inference_mode()
    def __call__(self) -> Found:
        ids, scores = torch.empty((1, 0), dtype=torch.int64), torch.zeros(1)
        for level, full in enumerate(self.bank):
            processor = PrefixConstrainedLogitsProcessor(self.allowed_tokens, num_beams=len(ids))
            logp = processor(ids, torch.log_softmax(full[: len(ids)], dim=-1))
            flat = (scores[:, None] + logp).view(-1)
            last = level + 1 == len(SIZES)
            scores, chosen = torch.topk(flat, TOP_N if last else WIDTH)
            if not last:
                chosen, order = chosen.sort()
                scores = scores[order]
            ids = torch.cat([ids[chosen // self.vocab], chosen[:, None] % self.vocab], dim=1)
        return ids.numpy() - np.asarray(OFFSETS), scores.numpy()


def prefix_dictionary(codes: Codes, sizes: Sequence[int] = SIZES) -> dict[tuple[int, ...], list[int]]:
    """Every prefix, as token ids, to the token ids that may follow it."""
    offsets = np.concatenate([[0], np.cumsum(sizes[:-1])])
    rows = (np.unique(codes, axis=0).astype(np.int64) + offsets).tolist()
    allowed: dict[tuple[int, ...], list[int]] = defaultdict(list)
    previous: list[int] = []
    for row in rows:
        for level in range(len(row)):
            if row[: level + 1] != previous[: level + 1]:
                allowed[tuple(row[:level])].append(row[level])
        previous = row
    return dict(allowed)


def ours(trie: AnyTrie, bank: Bank, mask: AnyMask | None = None) -> Callable[[], Found]:
    """Our search over the same bank."""
    config = BeamConfig(width=WIDTH, top_n=TOP_N)

    def step(codes: Codes, parents: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return bank[codes.shape[1]][: len(codes)]

    def search() -> Found:
        result = beam_search(step, trie, config, mask)
        return result.codes.astype(np.int64), result.scores

    return search


def overlay_search(base: SidTrie, added: int, bank: Bank) -> Callable[[], Found]:
    """Our search over a base and random additions, equal to that over one trie of all."""
    extra = np.random.default_rng(3).integers(0, SIZES, (2 * added, len(SIZES)))
    extra = extra[~base.contains(extra)][:added]
    search = ours(Overlay(base, SidTrie.build(extra, SIZES)), bank)
    whole = ours(SidTrie.build(np.concatenate([base.sids(), extra.astype(np.uint16)]), SIZES), bank)
    found, expected = search(), whole()
    if not (np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])):
        raise SystemExit("overlay: results differ from those of one trie; nothing was timed")
    return search


def check_equal(found: Found, expected: Found, name: str) -> None:
    """Same 50 SIDs and scores; SIDs may differ only where float32 cannot tell the scores apart."""
    if not np.allclose(found[1], expected[1], atol=2e-5):
        raise SystemExit(f"{name}: scores differ from ours; nothing was timed")
    differ = (found[0] != expected[0]).any(axis=1)
    gap = np.abs(np.diff(expected[1], prepend=np.inf, append=-np.inf))
    if (differ & (np.minimum(gap[:-1], gap[1:]) > 2e-5)).any():
        raise SystemExit(f"{name}: SIDs differ from ours; nothing was timed")


def timed(call: Callable[[], object], repeats: int, warm_up: int = 2) -> list[float]:
    """Milliseconds of each repeat."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def in_turns(
    ours: Callable[[], object], baseline: Callable[[], object], rounds: int = 9, repeats: int = 1, warm_up: int = 0
) -> tuple[list[float], list[float]]:
    """Milliseconds of each round: the median of `repeats` of our calls, and one of the baseline's."""
    timed(ours, 1, warm_up=1)
    timed(baseline, 1, warm_up=1)
    pairs = [
        (statistics.median(timed(ours, repeats, warm_up)), timed(baseline, 1, warm_up=0)[0]) for _ in range(rounds)
    ]
    return [mine for mine, _ in pairs], [theirs for _, theirs in pairs]


def measure(items: int, with_hf: bool) -> dict[str, object]:
    """All numbers at one catalog size."""
    codes, bank = catalog(items), logits()
    trie = SidTrie.build(codes, SIZES)
    row: dict[str, object] = {"items": items, "sids": trie.num_sids, "hardware": hardware(), "torch_threads": 2}
    median: dict[str, float] = {}

    def record(name: str, times: list[float]) -> None:
        median[name] = statistics.median(times)
        row[name] = round(median[name], 3)
        row[f"{name}_range"] = [round(min(times), 3), round(max(times), 3)]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trie.bin"
        trie.save(path)
        row["file_mb"] = round(path.stat().st_size / 1e6, 3)
        record("open_ms", timed(lambda: SidTrie.open(path), 21))
        trie = SidTrie.open(path)
        search = ours(trie, bank)
        expected = search()
        record("search_ms", timed(search, 101, warm_up=10))
        eligible = np.random.default_rng(2).random(trie.num_sids) < 0.5
        fresh = iter([SidTrie.open(path) for _ in range(7)])
        record("subset_first_ms", timed(lambda: next(fresh).subset(eligible), 7, warm_up=0))
        record("subset_ms", timed(lambda: trie.subset(eligible), 11))
        mask, gone = trie.subset(eligible), np.arange(0, trie.num_sids, trie.num_sids // 100)
        record("without_ms", timed(lambda: mask.without(gone), 11))
        record("masked_search_ms", timed(ours(trie, bank, mask), 101, warm_up=10))
        for added in (0, 1000):
            record(f"overlay_{added}_search_ms", timed(overlay_search(trie, added, bank), 101, warm_up=10))
    mine, theirs = in_turns(lambda: SidTrie.build(codes, SIZES), lambda: build_static(codes))
    record("build_ms", mine)
    record("static_build_ms", theirs)
    row["ratio_build"] = round(median["static_build_ms"] / median["build_ms"], 1)
    row["ratio_build_lowest"] = round(min(b / a for a, b in zip(mine, theirs, strict=True)), 1)
    baselines: dict[str, Callable[[], Found]] = {"static": StaticStyle(build_static(codes), bank)}
    if with_hf:
        baselines["hf"] = HfStyle(codes, bank)
    for name, baseline in baselines.items():
        check_equal(baseline(), expected, name)
        mine, theirs = in_turns(search, baseline, repeats=15, warm_up=2)
        record(f"{name}_style_ms", theirs)
        row[f"ratio_{name}"] = round(statistics.median(theirs) / statistics.median(mine), 1)
        row[f"ratio_{name}_lowest"] = round(min(b / a for a, b in zip(mine, theirs, strict=True)), 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time the trie against padded-CSR PyTorch and Hugging Face styles."
    )
    parser.add_argument("--items", type=int, action="append", help="catalog size; repeatable (default 1000000)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and nothing else")
    parser.add_argument(
        "--skip-hf", action="store_true", help="leave out the Python baseline (it needs gigabytes)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    for items in arguments.items or [1_000_000]:
        row = measure(items, with_hf=not arguments.skip_hf)
        lines = [f"{name:>22}  {value}" for name, value in row.items()]
        print(json.dumps(row) if arguments.json else "\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
