"""The reward model of PARS (spec §4.9): three towers for click, order given click, and click-and-order, and R_score.

Reads the query, the item, the user's recent clicks (attended by the item, SIM-style) and their mean, and the profile.

Legend: B rows, E width of text vectors, M recent items.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onesearch.progress import track
from training.pars import LEVEL_WEIGHTS, Preference
from training.rewards import Relevance
from training.samples import Sources
from training.sessions import PageView

# Labels of CTR, CVR and CTCVR by level; levels 4 to 6 have none.
LABELS = {1: (1.0, 1.0, 1.0), 2: (1.0, 1.0, 1.0), 3: (1.0, 0.0, 0.0)}
_NOTHING = (0.0, 0.0, 0.0)
_RECENT = 20
_BATCH, _EPOCHS, _WIDTH, _RATE = 256, 2, 64, 3e-3


class Towers(nn.Module):
    """Logits of CTR, CVR and CTCVR."""

    def __init__(self, width: int, profiles: int) -> None:
        super().__init__()
        self.attend = nn.Linear(width, width, bias=False)
        self.profile = nn.Embedding(profiles, 8)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(6 * width + 8, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 1)) for _ in _NOTHING
        )

    def forward(self, query: Tensor, item: Tensor, recent: Tensor, seen: Tensor, profile: Tensor) -> Tensor:
        """[B, 3] of query, item [B, E]; recent [B, M, E] where seen bool [B, M]; profile int64 [B]."""
        scores = (self.attend(recent) @ item[..., None])[..., 0].masked_fill(~seen, -1e9)
        weights = torch.softmax(scores, dim=1) * seen
        interest = (weights[:, None] @ recent)[:, 0]
        mean = (recent * seen[..., None]).sum(dim=1) / seen.sum(dim=1, keepdim=True).clamp_min(1)
        parts = [query, item, query * item, interest, interest * item, mean, self.profile(profile)]
        return torch.cat([tower(torch.cat(parts, dim=1)) for tower in self.towers], dim=1)


class RewardModel:
    """The towers with what they read: text vectors of titles and queries, profiles by number."""

    def __init__(self, sources: Sources, relevance: Relevance) -> None:
        titles = dict(sources.items.select("item_id", "item_title").iter_rows())
        queries = list(sources.query_sids)
        vectors = torch.from_numpy(sources.encoder.embedder.embed([*titles.values(), *queries]))
        self._items = torch.cat([vectors[: len(titles)], torch.zeros(1, vectors.shape[1])])  # the last is nothing
        self._row = {item: i for i, item in enumerate(titles)}
        self._queries = dict(zip(queries, vectors[len(titles) :], strict=True))
        profiles = sorted({view.context.profile for view in sources.views})
        self._profiles = {profile: i for i, profile in enumerate(profiles)}
        self._relevance = relevance
        with torch.random.fork_rng():
            torch.manual_seed(sources.seed)
            self.towers = Towers(vectors.shape[1], len(profiles))

    def fit(self, views: Sequence[PageView], found: Sequence[Preference], seed: int) -> float:
        """Binary cross-entropy of each tower over the items of preferences; returns the last epoch's mean."""
        rows = [
            (p.view, item, LABELS.get(lv, _NOTHING))
            for p in found
            for item, lv in zip(p.items, p.levels, strict=True)
        ]
        optimiser = torch.optim.Adam(self.towers.parameters(), lr=_RATE)
        losses: list[float] = []
        for epoch in range(_EPOCHS):
            order = np.random.default_rng([seed, 9, epoch]).permutation(len(rows))
            starts = range(0, len(order), _BATCH)
            losses = []
            for start in track(starts, f"reward model, epoch {epoch + 1}"):
                batch = [rows[i] for i in order[start : start + _BATCH]]
                logits = self.towers(*self._inputs([(views[v], item) for v, item, _ in batch]))
                loss = F.binary_cross_entropy_with_logits(logits, torch.tensor([labels for *_, labels in batch]))
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                losses.append(loss.item())
        return sum(losses) / max(1, len(losses))

    @torch.no_grad()
    def score(self, view: PageView, items: Sequence[int]) -> list[float]:
        """R_score = λ1 CTR + λ2 CVR + λ3 CTCVR + 10 λ4 S_Rel per item; λ by level, S_Rel the grade over 3."""
        rates = torch.sigmoid(self.towers(*self._inputs([(view, item) for item in items])))
        graded = [self._relevance.grade(view.context.query, item)[0] / 3 for item in items]
        weighted = (rates * torch.tensor(LEVEL_WEIGHTS[:3])).sum(dim=1).tolist()
        return [rate + 10 * LEVEL_WEIGHTS[3] * grade for rate, grade in zip(weighted, graded, strict=True)]

    def _inputs(self, pairs: Sequence[tuple[PageView, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        nothing = len(self._row)
        recent = torch.full((len(pairs), _RECENT), nothing)
        for i, (view, _) in enumerate(pairs):
            known = [self._row[j] for j in view.context.recent_items if j in self._row][-_RECENT:]
            recent[i, : len(known)] = torch.tensor(known, dtype=torch.long)
        return (
            torch.stack([self._queries[view.context.query] for view, _ in pairs]),
            self._items[torch.tensor([self._row[item] for _, item in pairs])],
            self._items[recent],
            recent != nothing,
            torch.tensor([self._profiles[view.context.profile] for view, _ in pairs]),
        )
