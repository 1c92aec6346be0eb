"""The gate of the streaming update (spec §4.13): how a model does on fixed searches, and whether it may be served.

The searches are the bundle's held-out ones. No training ever sees them, and they travel from version to version.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from onesearch.bundle import Bundle, HeldOut
from onesearch.model import OneSearchModel, TorchDecoder
from onesearch.search import SearchOptions
from training.batches import Inputs
from training.evaluate import bundle_subject
from training.grades import Grader, measure_relevance
from training.losses import sid_kl
from training.subject import MODEL, measure_validity, rank

_TOP, _WIDTH = 10, 128  # items and beams of a search; served beams are wider, and slower by as much
_BATCH = 128  # prompts of one forward pass
_SHOWN = {"hr": "HR@10", "valid": "valid SID@10", "ndcg": "nDCG@10"}


@dataclass(frozen=True)
class Numbers:
    """What the gate reads. hr: share of the clicked items in the top 10, by request in `found` and their mean; valid:
    share of the first 10 beams without the trie that name a live SID; ndcg: relevance nDCG@10, None without labels;
    kl: nats per SID of KL(served ‖ this model) along the SIDs of clicked items.
    """

    hr: float
    valid: float
    ndcg: float | None
    kl: float
    found: tuple[float, ...]


@dataclass(frozen=True)
class GateConfig:
    """How far a number may fall below the best that was served, and the largest KL to the model served last."""

    hr: float = 0.02
    valid: float = 0.05
    ndcg: float = 0.02
    kl: float = 0.5

    def refusal(self, numbers: Numbers, served: Sequence[Mapping[str, float | None]]) -> str:
        """Why a model with these numbers may not be served, in one line; empty if it may.

        served: the numbers of everything that was served before.
        """
        for name, shown in _SHOWN.items():
            value, known = getattr(numbers, name), [n for row in served if (n := row[name]) is not None]
            if value is not None and known and not value >= max(known) - getattr(self, name):
                least = f"{max(known) - getattr(self, name):.3f}"
                return f"{shown} is {value:.3f}, expected at least {least} (best served {max(known):.3f})"
        if not numbers.kl <= self.kl:
            return f"KL to the served model is {numbers.kl:.3g}, expected at most {self.kl:g}"
        return ""


def measure(
    bundle: Bundle,
    model: OneSearchModel,
    served: OneSearchModel,
    requests: Sequence[HeldOut],
    grader: Grader,
    seed: int,
) -> Numbers:
    """The numbers of a model over the catalog of `bundle`. Raises DecodeError when it gives no finite scores."""
    subject = bundle_subject(bundle, TorchDecoder(model, bundle.renderer), SearchOptions(limit=_TOP, width=_WIDTH))
    contexts = [request.context for request in requests]
    rows = rank(subject, contexts, {}).rows[MODEL]
    targets = [bundle.catalog.index(request.clicked) for request in requests]
    found = [float(np.isin(target, top).mean()) for target, top in zip(targets, rows, strict=True)]
    labelled = measure_relevance([context.query for context in contexts], {MODEL: rows}, grader, MODEL, seed)
    return Numbers(
        hr=float(np.mean(found)),
        valid=measure_validity(subject, contexts, seed)[0].systems[MODEL].value,
        ndcg=labelled[0].systems[MODEL].value if labelled else None,
        kl=divergence(bundle, model, served, requests),
        found=tuple(found),
    )


@torch.no_grad()
def divergence(
    bundle: Bundle, model: OneSearchModel, served: OneSearchModel, requests: Sequence[HeldOut]
) -> float:
    """Mean KL(served ‖ model) over requests, summed over the levels of the SID of the first clicked live item."""
    paths = [(r.context, sids[0]) for r in requests if len(sids := bundle.catalog.sids_of(r.clicked))]
    total = 0.0
    for start in range(0, len(paths), _BATCH):
        some = paths[start : start + _BATCH]
        prompts = [bundle.renderer.prompt("search", bundle.encoder.fields(context)) for context, _ in some]
        inputs = Inputs.of(prompts, bundle.renderer.pad)
        tokens = torch.from_numpy(bundle.renderer.sids.token_ids(np.stack([sid for _, sid in some])))
        total += float(sid_kl(served.sid_logits(*inputs, tokens), model.sid_logits(*inputs, tokens)).sum())
    return total / max(1, len(paths))


def as_json(numbers: Numbers) -> dict[str, float | None]:
    """The numbers without those of single requests."""
    plain = asdict(numbers)
    del plain["found"]
    return plain
