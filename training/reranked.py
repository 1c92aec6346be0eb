"""Phase 1 of PARS (spec §4.9): the model's own candidates, re-ranked by the reward model, as preferences."""

from collections.abc import Mapping, Sequence

import numpy as np

from onesearch.decode import BeamConfig, beam_search
from onesearch.model import OneSearchModel, TorchDecoder
from onesearch.progress import track
from training.objective import evaluating
from training.pars import Preference
from training.reward_model import RewardModel
from training.rewards import Rewards
from training.samples import Sources


def reranked_preferences(
    model: OneSearchModel,
    sources: Sources,
    rewards: Rewards,
    scorer: RewardModel,
    prompts: int,
    candidates: int,
    negatives: int,
) -> list[Preference]:
    """Preferences of at most `prompts` page views with a click, where the scores change the model's order."""
    order = np.random.default_rng([sources.seed, 10]).permutation(len(sources.views))
    asked = [i for i in order.tolist() if sources.views[i].clicked][:prompts]
    decoder = TorchDecoder(model, sources.renderer)
    config = BeamConfig(width=candidates, top_n=candidates)
    found: list[Preference] = []
    with evaluating(model):
        for number in track(asked, "candidates"):
            view = sources.views[number]
            fields = sources.encoder.fields(view.context, sources.query_sids[view.context.query])
            codes = beam_search(
                decoder.start(sources.renderer.prompt("search", fields)), sources.trie, config
            ).codes
            items = [item for row in codes.tolist() if (item := rewards.item(row)) is not None]
            scores = dict(zip(items, scorer.score(view, items), strict=True))
            ranked = changed(items, scores, view.clicked, negatives)
            if ranked:
                found.append(Preference(number, ranked, tuple(scores[item] for item in ranked)))
    return found


def changed(
    items: Sequence[int], scores: Mapping[int, float], clicked: Sequence[int], negatives: int
) -> tuple[int, ...]:
    """One positive and its negatives, or nothing where scoring keeps the model's order `items`, best first.

    The positive is the best-scored item that was promoted or clicked; negatives are the worst-scored of the items
    that lost places, score less and were not clicked.
    """
    ranked = sorted(items, key=lambda item: -scores[item])
    if ranked == list(items):
        return ()
    moved = {item: list(items).index(item) - place for place, item in enumerate(ranked)}
    best = next(item for item in ranked if moved[item] > 0 or item in clicked)
    losers = [i for i in reversed(ranked) if moved[i] < 0 and scores[i] < scores[best] and i not in clicked]
    return (best, *losers[:negatives]) if losers else ()
