"""Evaluation on held-out logs: does the model find what people clicked and ordered, beside BM25 and popularity?

Legend: N items, V page views, U units: one clicked item of one page view. A page view's value is the mean over its
units, so page views weigh the same however much was clicked (spec §5.2).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onesearch.catalog import Catalog
from onesearch.errors import DataError
from training.baselines import Baseline, Bm25, CategoryPopularity, item_text
from training.grades import Grader, measure_relevance
from training.metrics import (
    Estimate,
    Floats,
    Measured,
    Rows,
    calibration_error,
    compare,
    coverage,
    exposure_gini,
    hits,
    item_rank,
    leaf_numbers,
    optimistic_rank,
    per_view,
    reciprocal,
    sid_rank,
    top_rows,
)
from training.negation import Exclusions, measure_violations
from training.overlap import KeywordsOf, measure_overlap
from training.sessions import PageView
from training.subject import (
    BM25,
    MODEL,
    POPULARITY,
    Ranking,
    Report,
    Subject,
    item_bodies,
    measure_validity,
    rank,
    sample,
)

_DETAILED = ("clicks", "orders")  # slices with all cutoffs and collision rules; the others show HR@10 and MRR@10
_TOP = 10  # list length of coverage, Gini, category hits and calibration
COLD_DAYS, HOT_SHARE = 7, 0.1

Ranks = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Units:
    """What page views clicked: view int64 [U] (position in the list asked), row int64 [U] (-1: not in the catalog)."""

    view: Ranks
    row: Ranks
    ordered: Mask


def evaluate_logs(
    subject: Subject,
    views: Sequence[PageView],
    split: str,
    max_requests: int | None,
    seed: int,
    negations: Mapping[str, Exclusions] | None = None,
    grader: Grader | None = None,
    keywords: KeywordsOf | None = None,
) -> Report:
    """HR, MRR and valid-SID rate on the page views of a split that clicked something, with baselines.

    negations: what queries exclude, where the truth of a simulation tells (`training.negation`). grader: relevance
    labels (`training.grades`). keywords: what queries ask for (`training.overlap`).
    Raises DataError when there is no such page view. A clicked item that the catalog lacks counts as not found.
    """
    inside = [view for view in views if view.split == split]
    clicking = [view for view in inside if view.clicked]
    if not clicking:
        found = f"{len(inside)} page views of split {split!r}, none with a click; expected at least one"
        raise DataError("recall", [found])
    asked = sample(clicking, max_requests, seed)
    train = [view for view in views if view.split == "train"]
    contexts = [view.context for view in asked]
    ranking = rank(subject, contexts, log_baselines(subject.catalog, train))
    ranked = ranking.rows
    units = clicked_units(asked, subject.catalog.row_of)
    ranks = _ranks(units, ranked, subject.catalog)
    slices, cuts = query_slices(asked, units, train)
    users, activity = _user_slices(asked, units, train)
    slices |= users | _item_slices(asked, units, train, subject.catalog)
    measured: list[Measured] = []
    for name, keep in slices.items():
        measured += compare(name, _values(ranks, units, keep, name in _DETAILED), MODEL, seed)
    measured += _category_hits(units, ranked, subject.catalog, slices["clicks"], seed)
    queries = [context.query for context in contexts]
    if grader is not None:
        measured += measure_relevance(queries, ranked, grader, MODEL, seed)
    measured += measure_violations(queries, ranked, subject.catalog, negations or {}, MODEL, seed)
    if keywords is not None:
        measured += measure_overlap(queries, ranked, subject.catalog, keywords, MODEL, seed)
    measured += _spread(ranked, subject.catalog.num_items) + measure_validity(subject, contexts, seed)
    measured.append(_calibration(ranking, units, subject.catalog))
    facts = ranking.facts | {
        "split": split,
        "sources": dict(Counter(view.source for view in asked)),
        "page_views": len(inside),
        "page_views_without_click": len(inside) - len(clicking),
        "page_views_asked": len(asked),
        "clicked_items": len(units.row),
        "clicked_items_not_in_catalog": int((units.row < 0).sum()),
        "train_count_of_query": cuts,
        "train_count_of_user": activity,
        "empty_slices": [name for name, keep in slices.items() if not keep.any()],
    }
    kept = {name: np.flatnonzero(keep).tolist() for name, keep in slices.items()}
    shown = {
        "session": [asked[v].session_id for v in units.view],
        "rank": ranks[""][MODEL].tolist(),
        "slices": kept,
    }
    return Report(measured, facts, shown)


def log_baselines(catalog: Catalog, train: Sequence[PageView]) -> dict[str, Baseline]:
    """BM25 on title and attributes, and popularity in the query's leaf category, from training page views."""
    bodies = item_bodies(catalog)
    clicked: dict[str, Counter[int]] = defaultdict(Counter)
    for view in train:
        clicked[view.context.query].update(catalog.rows_of(view.clicked).tolist())
    bm25 = Bm25([item_text(body) for body in bodies])
    paths = ["/".join(body["category"]) for body in bodies]
    return {BM25: bm25, POPULARITY: CategoryPopularity(paths, clicked, bm25)}


def clicked_units(asked: Sequence[PageView], row_of: Callable[[int], int | None]) -> Units:
    """One unit per (page view, clicked item), in order; row_of gives an item's row, None if there is none."""
    pairs = [(i, item, item in view.ordered) for i, view in enumerate(asked) for item in view.clicked]
    rows = [row_of(item) for _, item, _ in pairs]
    return Units(
        view=np.asarray([i for i, _, _ in pairs], dtype=np.int64),
        row=np.asarray([-1 if row is None else row for row in rows], dtype=np.int64),
        ordered=np.asarray([ordered for *_, ordered in pairs], dtype=np.bool_),
    )


def _item_slices(
    asked: Sequence[PageView], units: Units, train: Sequence[PageView], catalog: Catalog
) -> dict[str, Mask]:
    """Masks over units for items never clicked in training, cold ones and hot ones (spec §5.2).

    Cold: published at most COLD_DAYS before the page view (times in Unix seconds) and never clicked in training. Hot:
    among the top HOT_SHARE of its leaf category by orders in training.
    """
    warm = np.zeros(catalog.num_items + 1, dtype=np.bool_)  # the last entry stands for items not in the catalog
    warm[-1] = True
    for view in train:
        warm[catalog.rows_of(view.clicked)] = True
    published = np.append(catalog.columns.arrays["published_at"], 0)[units.row]
    age = np.asarray([view.time for view in asked])[units.view] - published
    fresh = (published > 0) & (age >= 0) & (age <= COLD_DAYS * 86_400)
    hot = np.append(best_sellers(catalog, train), False)
    new = ~warm[units.row]
    return {"not clicked in train": new, "cold items": fresh & new, "hot items": hot[units.row]}


def best_sellers(catalog: Catalog, train: Sequence[PageView]) -> Mask:
    """bool [N]: the HOT_SHARE of each leaf category (rounded up) with most orders, at least one; equals by row."""
    orders = np.bincount(catalog.rows_of(i for view in train for i in view.ordered), minlength=catalog.num_items)
    hot = np.zeros(catalog.num_items, dtype=np.bool_)
    leaves = _leaf_categories(catalog)
    for leaf in np.unique(leaves):
        rows = np.flatnonzero(leaves == leaf)
        hot[rows[top_rows(orders[rows], math.ceil(HOT_SHARE * len(rows)))]] = True
    return hot & (orders > 0)


def _leaf_categories(catalog: Catalog) -> Ranks:
    """A number for the category path of each row, int64 [N]."""
    paths = catalog.columns.arrays["categories"]
    return np.asarray(np.unique(paths, axis=0, return_inverse=True)[1].reshape(-1), dtype=np.int64)


def _category_hits(
    units: Units, ranked: Mapping[str, Sequence[Rows]], catalog: Catalog, keep: Mask, seed: int
) -> list[Measured]:
    """Whether the top 10 holds an item of the clicked item's leaf category, per page view like HR."""
    leaves = np.append(_leaf_categories(catalog), -1)
    pairs = list(zip(units.view.tolist(), leaves[units.row].tolist(), strict=True))
    values = {
        system: np.asarray([float(leaf >= 0 and leaf in leaves[lists[view][:_TOP]]) for view, leaf in pairs])
        for system, lists in ranked.items()
    }
    by_view = {system: per_view(found, units.view, keep) for system, found in values.items()}
    return compare("clicks", {f"category hit@{_TOP}": by_view}, MODEL, seed)


def _calibration(ranking: Ranking, units: Units, catalog: Catalog) -> Measured:
    """Expected calibration error of exp(score) as the probability that a click is on a SID, over SIDs of the top 10.

    A SID's outcome is the share of the page view's clicked items that have it.
    """
    leaf = leaf_numbers(catalog.sids)
    clicked: dict[int, list[int]] = defaultdict(list)
    for view, row in zip(units.view.tolist(), units.row.tolist(), strict=True):
        clicked[view].append(int(leaf[row]) if row >= 0 else -1)
    probabilities, outcomes = [], []
    for view, (rows, scores) in enumerate(zip(ranking.rows[MODEL], ranking.scores, strict=True)):
        shown, first = np.unique(leaf[rows[:_TOP]], return_index=True)
        probabilities += np.exp(scores[first]).tolist()
        outcomes += [clicked[view].count(sid) / len(clicked[view]) for sid in shown.tolist()]
    error = calibration_error(np.asarray(probabilities), np.asarray(outcomes)) if probabilities else 0.0
    return Measured("beam scores", f"ECE@{_TOP}", len(outcomes), {MODEL: Estimate(error)}, {})


def query_slices(
    asked: Sequence[PageView], units: Units, train: Sequence[PageView]
) -> tuple[dict[str, Mask], dict[str, str]]:
    """Masks over units by action and by terciles of the query's training count, and where the terciles were cut."""
    counts = Counter(view.context.query for view in train)
    masks, cuts = _terciles([counts[view.context.query] for view in asked], units, ("tail", "middle", "head"))
    whole = {"clicks": np.ones(len(units.row), dtype=np.bool_), "orders": units.ordered}
    return whole | {f"{name} queries": masks[name] for name in ("head", "middle", "tail")}, cuts


def _user_slices(
    asked: Sequence[PageView], units: Units, train: Sequence[PageView]
) -> tuple[dict[str, Mask], dict[str, str]]:
    """Masks over units by terciles of what the user did in training: searches, clicks and orders added up (spec §5.2,
    which counts spend too: logs have none)."""
    counts: Counter[int] = Counter()
    for view in train:
        counts[view.user_id] += 1 + len(view.clicked) + len(view.ordered)
    masks, cuts = _terciles([counts[view.user_id] for view in asked], units, ("low", "mid", "high"))
    return {f"{name}-activity users": mask for name, mask in masks.items()}, cuts


def _terciles(
    counts: Sequence[int], units: Units, names: tuple[str, str, str]
) -> tuple[dict[str, Mask], dict[str, str]]:
    """Masks over units by terciles of a count per page view, lowest first, and where they were cut."""
    low, high = (int(cut) for cut in np.percentile(counts, [100 / 3, 200 / 3], method="lower"))
    of_unit = np.asarray(counts)[units.view]
    masks = (of_unit <= low, (of_unit > low) & (of_unit <= high), of_unit > high)
    cuts = (f"<= {low}", f"> {low}, <= {high}", f"> {high}")
    return dict(zip(names, masks, strict=True)), dict(zip(names, cuts, strict=True))


def _ranks(units: Units, ranked: Mapping[str, Sequence[Rows]], catalog: Catalog) -> dict[str, dict[str, Ranks]]:
    """Ranks of every unit's target: by item for each system, by SID and optimistic for the model (spec §5.2)."""
    pairs = list(zip(units.view.tolist(), units.row.tolist(), strict=True))
    leaf = leaf_numbers(catalog.sids)
    leaves = [leaf[rows] for rows in ranked[MODEL]]
    targets = np.where(units.row < 0, -1, leaf[units.row]).tolist()
    ranks = {
        "": {name: np.asarray([item_rank(lists[v], row) for v, row in pairs]) for name, lists in ranked.items()}
    }
    for kind, place in (("SID ", sid_rank), ("optimistic ", optimistic_rank)):
        found = [place(leaves[v], target) for (v, _), target in zip(pairs, targets, strict=True)]
        ranks[kind] = {MODEL: np.asarray(found)}
    return ranks


def _values(
    ranks: Mapping[str, Mapping[str, Ranks]], units: Units, keep: Mask, detailed: bool
) -> dict[str, dict[str, Floats]]:
    """Per-page-view values of one slice: measure → system → float64 [V]."""
    values: dict[str, dict[str, Floats]] = {}
    for kind, systems in ranks.items():
        if kind and not detailed:
            continue
        depths = (1, 10, 50, 100) if detailed and not kind else (10,)
        cutoffs = [*(("HR", hits, k) for k in depths), ("MRR", reciprocal, 10)]
        for name, measure, k in cutoffs:
            values[f"{kind}{name}@{k}"] = {
                s: per_view(measure(r, k), units.view, keep) for s, r in systems.items()
            }
    return values


def _spread(ranked: Mapping[str, Sequence[Rows]], num_items: int) -> list[Measured]:
    """How widely the top lists spread over the catalog; values of the whole run, hence without intervals."""
    count = len(ranked[MODEL])
    return [
        Measured(
            "recommended items", name, count, {s: Estimate(f(r, num_items, _TOP)) for s, r in ranked.items()}, {}
        )
        for name, f in ((f"coverage@{_TOP}", coverage), (f"Gini@{_TOP}", exposure_gini))
    ]
