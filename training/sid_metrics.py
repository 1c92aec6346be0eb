"""How good a set of SIDs is, before any model is trained on it (spec §3.5). Pure functions of codes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onesearch.sid import RQ_LEVELS, Codes

Int64 = npt.NDArray[np.int64]


def sid_report(
    item_codes: Codes,
    sizes: Sequence[int],
    pairs: tuple[Codes, Codes] | None = None,
    categories: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Figures of item codes [N, 5], JSON-ready; every CUR carries the number it was divided by.

    `pairs` are the codes of queries and of the items clicked for them, [P, 5] each: adds `prefix_agreement`,
    the share of pairs whose first 1, 2, 3 codes are equal. `categories` [N] adds `category_nmi` of each RQ prefix.
    Raises ValueError when there are no items.
    """
    if not len(item_codes):
        raise ValueError("item codes: none, expected at least one row")
    prefixes = [_labels(item_codes[:, :level]) for level in range(1, item_codes.shape[1] + 1)]
    buckets = np.bincount(prefixes[-1])
    rq_buckets = np.bincount(prefixes[RQ_LEVELS - 1])
    report: dict[str, Any] = {
        "items": len(item_codes),
        "sizes": list(sizes),
        "cur_l1": _utilisation(prefixes[0], sizes[:1]),
        "cur_l1l2": _utilisation(prefixes[1], sizes[:2]),
        "cur_total": _utilisation(prefixes[RQ_LEVELS - 1], sizes[:RQ_LEVELS]),
        "icr": float((buckets == 1).sum() / len(item_codes)),
        "icr_rq": float((rq_buckets == 1).sum() / len(item_codes)),
        "collision_free": float(len(buckets) / len(item_codes)),
        "max_bucket": int(buckets.max()),
        "bucket_gini": gini(buckets),
        "bucket_entropy": _entropy(buckets),
        "perplexity": [float(np.exp(_entropy(np.bincount(codes)))) for codes in item_codes.T],
        "dead_codes": [int(size - len(np.unique(codes))) for codes, size in zip(item_codes.T, sizes, strict=True)],
    }
    if pairs is not None:
        report["prefix_agreement"] = prefix_agreement(*pairs)
    if categories is not None:
        category = np.unique(np.asarray(categories), return_inverse=True)[1]
        report["category_nmi"] = [_nmi(labels, category) for labels in prefixes[:RQ_LEVELS]]
    return report


def prefix_agreement(query_codes: Codes, item_codes: Codes) -> list[float]:
    """Share of rows whose first 1, 2 and 3 codes are equal; three floats, 0 without rows."""
    equal = np.logical_and.accumulate(query_codes[:, :RQ_LEVELS] == item_codes[:, :RQ_LEVELS], axis=1)
    return [float(share) for share in equal.sum(axis=0) / max(1, len(equal))]


def _labels(codes: Codes) -> Int64:
    """Rows numbered by their distinct prefix."""
    return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)


def _utilisation(labels: Int64, sizes: Sequence[int]) -> dict[str, float | int]:
    """Codebook utilisation rate: used prefixes over possible ones."""
    used, possible = int(labels.max()) + 1, int(np.prod([int(size) for size in sizes], dtype=object))
    return {"rate": used / possible, "used": used, "of": possible}


def _entropy(counts: Int64) -> float:
    """Natural-log entropy of counts."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def gini(counts: Int64) -> float:
    """Gini coefficient of non-negative counts, at least one above 0: 0 when all are equal."""
    ordered = np.sort(counts).astype(np.float64)
    ranks = np.arange(1, len(ordered) + 1)
    return float(2 * (ranks * ordered).sum() / (len(ordered) * ordered.sum()) - (len(ordered) + 1) / len(ordered))


def _nmi(first: Int64, second: Int64) -> float:
    """Normalised mutual information with the arithmetic mean of the entropies; 0 when both are constant."""
    joint = np.unique(np.stack([first, second]), axis=1, return_counts=True)[1]
    entropies = _entropy(np.bincount(first)), _entropy(np.bincount(second))
    mutual = sum(entropies) - _entropy(joint)
    return float(2 * mutual / sum(entropies)) if sum(entropies) > 0 else 0.0
