"""Ranking measures as pure functions over catalog rows, and how two systems compare on the same requests.

Owns the definitions of spec §5.2 and nothing else: no bundle, no model, no files. Ranks are 1-based, 0 means absent.
Graded measures come from ir-measures; what it lacks (several targets per page view, SID collisions, free beams) is
here. Legend: N items, U units (one clicked item of one page view), V values per unit or query, L levels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
import numpy as np
import numpy.typing as npt
from ir_measures import RR, Judged, R, nDCG

from onesearch.decode import StepFn
from onesearch.sid import Codes
from training.sid_metrics import gini

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

RELEVANT = 1  # the lowest rating that counts as relevant for recall and MRR
RESAMPLES = 1000
CALIBRATION_BINS = 10
_GRADED = {
    "nDCG@10": nDCG @ 10,
    "nDCG@10 judged only": nDCG(judged_only=True) @ 10,
    "recall@10": R(rel=RELEVANT) @ 10,
    "recall@100": R(rel=RELEVANT) @ 100,
    "MRR@10": RR(rel=RELEVANT) @ 10,
    "judged@10": Judged @ 10,
}


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval; low and high are None for a value that has no interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measured:
    """One measure on one slice. count: page views or queries behind it.

    systems: each system's estimate. differences: subject minus each other system, paired by page view or query.
    """

    slice: str
    measure: str
    count: int
    systems: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]


def leaf_numbers(sids: Codes) -> Rows:
    """Number of the SID each row holds, int64 [N], for SIDs uint16 [N, L] in sorted order (catalog row order)."""
    return np.cumsum(np.r_[0, (sids[1:] != sids[:-1]).any(axis=1)], dtype=np.int64)


def item_rank(rows: Rows, target: int) -> int:
    """Rank of the row `target` in a ranked list; 0 when it is absent or target is -1 (not in the catalog)."""
    return _first(rows == target) if target >= 0 else 0


def sid_rank(leaves: Rows, target: int) -> int:
    """Rank of the SID numbered `target` among the distinct SIDs of a list of items' SID numbers."""
    first = _first(leaves == target)
    return len(np.unique(leaves[:first]))


def optimistic_rank(leaves: Rows, target: int) -> int:
    """Item rank if the target were always the first item of its SID: what ignoring collisions would report."""
    return _first(leaves == target)


def _first(found: npt.NDArray[np.bool_]) -> int:
    at = np.flatnonzero(found)
    return int(at[0]) + 1 if len(at) else 0


def hits(ranks: npt.NDArray[np.int64], k: int) -> Floats:
    """HR@k per unit: 1 where 1 ≤ rank ≤ k, float64 [U]."""
    return ((ranks > 0) & (ranks <= k)).astype(np.float64)


def reciprocal(ranks: npt.NDArray[np.int64], k: int) -> Floats:
    """MRR@k per unit: 1 / rank where 1 ≤ rank ≤ k, else 0, float64 [U]."""
    return hits(ranks, k) / np.maximum(ranks, 1)


def per_view(values: Floats, views: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_]) -> Floats:
    """Mean over the kept units of each page view that has any; float64 [V], in page-view order.

    This is what weights page views equally although they hold different numbers of clicked items.
    """
    count = np.bincount(views[keep])
    total = np.bincount(views[keep], weights=values[keep])
    seen = count > 0
    return np.asarray(total[seen] / count[seen], dtype=np.float64)


def compare(
    name: str,
    values: Mapping[str, Mapping[str, Floats]],
    subject: str,
    seed: int,
    resamples: int = RESAMPLES,
) -> list[Measured]:
    """Estimates of values[measure][system] (float64 [V], all of one slice) and paired differences to `subject`.

    Percentile bootstrap over page views or queries; all systems and measures share the resamples, so the
    differences are paired. An empty slice gives no measures.
    """
    columns: list[Floats] = []
    for systems in values.values():
        columns += systems.values()
        columns += [systems[subject] - other for system, other in systems.items() if system != subject]
    matrix = np.stack(columns, axis=1)
    if not len(matrix):
        return []
    estimates = iter(bootstrap(matrix, seed, resamples))
    measured: list[Measured] = []
    for measure, systems in values.items():
        own = {system: next(estimates) for system in systems}
        differences = {system: next(estimates) for system in systems if system != subject}
        measured.append(Measured(name, measure, len(matrix), own, differences))
    return measured


def bootstrap(values: Floats, seed: int, resamples: int = RESAMPLES) -> list[Estimate]:
    """Mean and 95 % percentile interval of each column of values float64 [V, M]; rows are resampled whole."""
    rng = np.random.default_rng(seed)
    count = len(values)
    means = np.empty((resamples, values.shape[1]))
    for i in range(resamples):
        drawn = np.bincount(rng.integers(count, size=count), minlength=count)
        means[i] = drawn @ values / count
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return [Estimate(float(m), float(a), float(b)) for m, a, b in zip(values.mean(axis=0), low, high, strict=True)]


def paired(gaps: Floats, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Mean of gaps float64 [S, V], S seeds and V page views, with its 95 % interval: both are drawn with replacement.

    With one seed the interval covers page views only.
    """
    rng = np.random.default_rng(seed)
    seeds, views = gaps.shape
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    means = np.empty(resamples)
    for i in range(resamples):
        weights = np.bincount(rng.integers(views, size=views), minlength=views) / views
        means[i] = drawn_seeds[i] @ gaps @ weights
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(gaps.mean()), float(low), float(high))


def ndcg(rows: Rows, grades: npt.NDArray[np.int64], k: int) -> float:
    """nDCG@k of a ranked list against the grades of all items, int64 [N], of which one is positive; gain = grade."""
    discounts = 1 / np.log2(np.arange(2, k + 2))
    found, best = grades[rows[:k]], np.sort(grades)[::-1][:k]
    return float(found @ discounts[: len(found)] / (best @ discounts[: len(best)]))


def calibration_error(probabilities: Floats, outcomes: Floats, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: mean |mean probability − mean outcome| over bins of equal numbers, float64 [U] each.

    Bins of equal width would hold nearly everything in the first: most of the SIDs of a beam are improbable.
    """
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return float(sum(len(p) * abs(probabilities[p].mean() - outcomes[p].mean()) for p in parts) / len(order))


def graded(ratings: Sequence[Mapping[int, int]], ranked: Sequence[Rows]) -> dict[str, Floats]:
    """Graded measures per query, float64 [V]: ratings[i] maps rows to ratings ≥ 0, ranked[i] is the list judged.

    nDCG as trec_eval (gain = rating), unjudged counted 0; `judged only` first takes unjudged items off the list;
    relevant means a rating ≥ RELEVANT. A query without a relevant item, or without results, scores 0.
    """
    qrels = {str(i): {str(row): int(r) for row, r in judged.items()} for i, judged in enumerate(ratings)}
    run = {
        str(i): {str(row): -float(at) for at, row in enumerate(r.tolist())} for i, r in enumerate(ranked) if len(r)
    }
    values = {name: np.zeros(len(ratings)) for name in _GRADED}
    names = {str(measure): name for name, measure in _GRADED.items()}
    if run:
        for found in ir_measures.iter_calc(list(_GRADED.values()), qrels, run):
            values[names[str(found.measure)]][int(found.query_id)] = found.value
    return values


def free_beams(step: StepFn, sizes: Sequence[int], width: int, top_n: int) -> Codes:
    """The top_n SIDs uint16 [n, L] of a beam search over all codes, valid or not, best first.

    Scores are sums of log-softmax over the codes of each level; ties go to the better prefix, then the smaller
    code. The constrained search is `onesearch.decode`; this one only serves the valid-SID rate (spec §5.2).
    """
    codes = np.zeros((1, 0), dtype=np.uint16)
    scores, parents = np.zeros(1), np.zeros(1, dtype=np.int64)
    for level, size in enumerate(sizes):
        logits = step(codes, parents).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        kept = width if level < len(sizes) - 1 else min(top_n, width)
        best = top_rows((scores[:, None] + logits).ravel(), kept)
        scores = (scores[:, None] + logits).ravel()[best]
        parents, chosen = best // size, (best % size).astype(np.uint16)
        codes = np.concatenate([codes[parents], chosen[:, None]], axis=1)
    return codes


def top_rows(scores: npt.NDArray[Any], count: int) -> Rows:
    """Positions of the `count` highest scores, best first, equal scores in position order, int64 [≤ count]."""
    if count < len(scores):
        bound = np.partition(scores, len(scores) - count)[len(scores) - count]
        above, level = np.flatnonzero(scores > bound), np.flatnonzero(scores == bound)
        candidates = np.sort(np.concatenate([above, level[: count - len(above)]]))
    else:
        candidates = np.arange(len(scores))
    return np.asarray(candidates[np.argsort(-scores[candidates], kind="stable")], dtype=np.int64)


def valid_share(codes: Codes, contains: Callable[[Codes], npt.NDArray[np.bool_]], n: int) -> float:
    """Share of the first n free beams that name a live SID; asks for n beams even if fewer exist."""
    return float(contains(codes[:n]).sum()) / n


def coverage(ranked: Sequence[Rows], num_items: int, k: int) -> float:
    """Share of the catalog that appears in the top k of any list."""
    return len(np.unique(np.concatenate([rows[:k] for rows in ranked]))) / num_items


def exposure_gini(ranked: Sequence[Rows], num_items: int, k: int) -> float:
    """Gini coefficient of how often each of num_items items is in a top k: 0 equal, towards 1 a few items get all."""
    counts = np.bincount(np.concatenate([rows[:k] for rows in ranked]), minlength=num_items)
    return gini(counts) if counts.any() else 0.0
