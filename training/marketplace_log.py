"""Sessions of the simulated marketplace: who searches when, what is shown, clicked, put in the cart and bought.

N sessions in time order, S sessions of one need, C eligible items, P = SHOWN positions, K = MAX_CLICKS. Padded
arrays hold item positions and -1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.marketplace_needs import Need
from training.marketplace_world import DAY, DAYS, START, TEST_SHARE, VALID_SHARE, Bools, Floats, Ints, World

SHOWN, ELIGIBLE_SHOWN, MAX_CLICKS = 20, 16, 5
SHOW_NOISE = 2.0  # Gumbel scale: what the shop shows is only roughly what the user would like best
CLICK_NOISE = 1.4
OFF_INTENT_PENALTY = 3.0


@dataclass(frozen=True)
class Log:
    """N sessions: need and surface form, shown [N, P], clicked [N, K] best first, carted and bought bool [N, K]."""

    user: Ints
    need: Ints
    text: Ints
    time: Ints
    split: npt.NDArray[np.str_]
    shown: Ints
    clicked: Ints
    carted: Bools
    bought: Bools


def simulate_log(
    world: World,
    needs: list[Need],
    weights: Floats,
    sessions: int,
    rng: np.random.Generator,
    advance: Callable[[int], None],
) -> Log:
    """Draw all sessions, one need at a time; `advance` is told how many sessions were added."""
    log = _empty(world, needs, weights, sessions, rng)
    order = np.argsort(log.need, kind="stable")
    bounds = np.searchsorted(log.need[order], np.arange(len(needs) + 1))
    by_department = [
        np.flatnonzero(world.type_department[world.items.type] == d) for d in range(len(world.words.departments))
    ]
    for index, need in enumerate(needs):
        rows = order[bounds[index] : bounds[index + 1]]
        if len(rows):
            log.text[rows] = rng.choice(len(need.texts), len(rows), p=need.weights)
            department = world.type_department[need.wants[0].type]
            others = np.setdiff1d(by_department[department], need.eligible, assume_unique=True)
            _fill(log, rows, world, need, others, rng)
            advance(len(rows))
    return log


def _empty(world: World, needs: list[Need], weights: Floats, sessions: int, rng: np.random.Generator) -> Log:
    """Users, needs and strictly increasing times; nothing shown yet."""
    ranks = np.arange(sessions) / sessions
    splits = np.where(
        ranks < 1 - TEST_SHARE - VALID_SHARE, "train", np.where(ranks < 1 - TEST_SHARE, "valid", "test")
    )
    return Log(
        user=rng.choice(len(world.users.gender), sessions, p=world.users.activity),
        need=rng.choice(len(needs), sessions, p=weights),
        text=np.zeros(sessions, dtype=np.int64),
        time=START + np.sort(rng.choice(DAYS * DAY, sessions, replace=False)),
        split=splits,
        shown=np.full((sessions, SHOWN), -1),
        clicked=np.full((sessions, MAX_CLICKS), -1),
        carted=np.zeros((sessions, MAX_CLICKS), dtype=bool),
        bought=np.zeros((sessions, MAX_CLICKS), dtype=bool),
    )


def _fill(log: Log, rows: Ints, world: World, need: Need, others: Ints, rng: np.random.Generator) -> None:
    """Show, click, cart and buy for the sessions `rows` of one need."""
    users, times = log.user[rows], log.time[rows]
    shown, score = _show(world, users, times, need.eligible, others, rng)
    position = np.argsort(-(score + rng.gumbel(0.0, SHOW_NOISE, score.shape)), axis=1)
    log.shown[rows] = np.take_along_axis(np.where(np.isneginf(score), -1, shown), position, axis=1)

    noisy = score + rng.gumbel(0.0, CLICK_NOISE, score.shape)
    best = np.argsort(-noisy, axis=1)[:, :MAX_CLICKS]
    count = np.where(rng.random(len(rows)) < 0.1, 0, np.minimum(1 + rng.poisson(0.7, len(rows)), MAX_CLICKS))
    valid = np.isfinite(np.take_along_axis(score, best, axis=1)) & (np.arange(MAX_CLICKS) < count[:, None])
    clicked = np.where(valid, np.take_along_axis(shown, best, axis=1), -1)
    log.clicked[rows] = clicked

    fit = _fit(world, users, clicked)
    carted = valid & (rng.random(fit.shape) < _sigmoid(fit - 1.2))
    log.carted[rows] = carted
    log.bought[rows] = carted & (rng.random(fit.shape) < _sigmoid(fit))


def _show(
    world: World, users: Ints, times: Ints, candidates: Ints, others: Ints, rng: np.random.Generator
) -> tuple[Ints, Floats]:
    """[S, P] shown items and their utility; -inf marks a place without a published item."""
    utility = published_utility(world, users, times, candidates)
    width = min(ELIGIBLE_SHOWN, len(candidates))
    noisy = utility + rng.gumbel(0.0, SHOW_NOISE, utility.shape)
    top = np.argpartition(-noisy, width - 1, axis=1)[:, :width]
    first, score = candidates[top], np.take_along_axis(utility, top, axis=1)
    if not len(others):
        padding = np.full((len(users), SHOWN - width), -1)
        return np.hstack([first, padding]), np.hstack([score, np.full(padding.shape, -np.inf)])
    fill = min(SHOWN - width, len(others))
    step = rng.integers(1, max(2, len(others) // fill), size=len(users))
    place = rng.integers(len(others), size=len(users))[:, None] + step[:, None] * np.arange(SHOWN - width)
    second = others[place % len(others)]
    rest = world.utility(users, second) - OFF_INTENT_PENALTY
    rest[world.items.published_at[second] > times[:, None]] = -np.inf
    rest[:, fill:] = -np.inf
    return np.hstack([first, second]), np.hstack([score, rest])


def published_utility(world: World, users: Ints, times: Ints, candidates: Ints) -> Floats:
    """[S, C] utility, -inf for items not yet published at the session's time."""
    utility = world.utility(users, candidates)
    utility[world.items.published_at[candidates] > times[:, None]] = -np.inf
    return utility


def _fit(world: World, users: Ints, items: Ints) -> Floats:
    """[S, K] how well price tier and brand suit the user; raises the odds of cart and order."""
    tier = np.abs(world.users.tier[users][:, None] - world.item_tier[items])
    liked = world.users.brand[users[:, None], world.items.brand[items]] > 0
    return np.asarray(0.8 - 0.9 * tier + 0.8 * liked, dtype=np.float64)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-x)), dtype=np.float64)


@dataclass(frozen=True)
class Ceilings:
    """HR@10 on the test split's clicks (one case per clicked item) of two rankings of the need's eligible items."""

    popularity: float
    oracle: float
    chance: float
    clicks: int


def ceilings(world: World, needs: list[Need], log: Log, k: int = 10) -> Ceilings:
    """What knowing the intent alone is worth: `popularity` ranks by clicks in the train split, `oracle` by the user's
    true utility, `chance` at random (spec §9.3)."""
    train = log.clicked[log.split == "train"]
    clicks = np.bincount(train[train >= 0], minlength=len(world.items.type)).astype(np.float64)
    test = np.flatnonzero(log.split == "test")
    hits = np.zeros(3)
    cases = 0
    for index in np.unique(log.need[test]):
        rows = test[log.need[test] == index]
        candidates, clicked = needs[index].eligible, log.clicked[rows]
        utility = published_utility(world, log.user[rows], log.time[rows], candidates)
        counts = np.where(np.isneginf(utility), -np.inf, clicks[candidates])
        chance = int((clicked >= 0).sum()) * min(1.0, k / len(candidates))
        hits += (_hits(candidates, counts, clicked, k), _hits(candidates, utility, clicked, k), chance)
        cases += int((clicked >= 0).sum())
    popularity, oracle, chance = (float(h) / max(cases, 1) for h in hits)
    return Ceilings(popularity, oracle, chance, cases)


def _hits(candidates: Ints, score: Floats, clicked: Ints, k: int) -> int:
    """Number of clicked items among the k best candidates of their session."""
    top = candidates[np.argsort(-score, axis=1, kind="stable")[:, :k]]
    return int((clicked[:, :, None] == top[:, None, :]).any(axis=2).sum())
