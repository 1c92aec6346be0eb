"""How a long history enters a prompt: behaviours kept apart become three vectors, one per RQ level (spec §3.6).

`history` of a recipe's [model] chooses between a mean with learned behaviour gates and a Q-Former. Either gives exact
zeros for a user without history, and takes no notice of a behaviour whose vectors are all zero.

Legend: B batch, R behaviours, E history width, D model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onesearch.backbones import MASKED
from onesearch.model_config import HistoryMode, ModelConfig


class GatedMean(nn.Module):
    """One linear projection of the mean over the behaviours a user has, v_l = Σ_r g_r·m_rl / Σ_r g_r.

    A gate g_r is the sigmoid of a learned number that starts at 0: at first all behaviours weigh the same.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(config.history_shape[0]))
        self.projection = nn.Linear(config.history_dim, config.d_model, bias=False)

    def forward(self, history: Tensor) -> Tensor:
        """[B, 3, D] of history [B, R, 3, E]."""
        known = _known(history)
        weights = torch.sigmoid(self.gates) * known
        total = weights.sum(1, keepdim=True) + 1 - known.amax(1, keepdim=True)  # 1 where nothing is known
        projected: Tensor = self.projection(((weights / total)[..., None, None] * history).sum(1))
        return projected


class QFormer(nn.Module):
    """Three learned queries attend over the R·3 vectors of a history, each marked by embeddings of behaviour and level.

    The Q-Former of BLIP-2 (Li et al., 2023) at its smallest: one block, pre-norm, of one-headed cross-attention and a
    feed-forward layer as wide as the model, without attention among the queries.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        (behaviours, levels, width), d = config.history_shape, config.d_model
        self.projection = nn.Linear(width, d, bias=False)
        self.behaviours, self.levels, self.queries = (
            nn.Parameter(0.02 * torch.randn(shape)) for shape in ((behaviours, 1, d), (levels, d), (levels, d))
        )
        self.query_norm, self.memory_norm, self.ffn_norm = (nn.LayerNorm(d) for _ in range(3))
        self.query, self.key, self.value, self.out, self.up, self.down = (nn.Linear(d, d) for _ in range(6))

    def forward(self, history: Tensor) -> Tensor:
        """[B, 3, D] of history [B, R, 3, E]."""
        known = _known(history)
        memory = self.memory_norm((self.projection(history) + self.behaviours + self.levels).flatten(1, 2))
        bias = ((1 - known) * MASKED)[..., None].expand(-1, -1, len(self.levels)).flatten(1)  # [B, R·3]
        queries = self.query(self.query_norm(self.queries)) * self.queries.shape[1] ** -0.5
        weights = torch.softmax(queries @ self.key(memory).transpose(1, 2) + bias[:, None], dim=-1)
        x = self.queries + self.out(weights @ self.value(memory))
        vectors: Tensor = x + self.down(F.gelu(self.up(self.ffn_norm(x))))
        return vectors * known.amax(1)[:, None, None]


def _known(history: Tensor) -> Tensor:
    """[B, R], 1 where a behaviour of history [B, R, 3, E] has a vector, else 0."""
    known: Tensor = (history.abs().amax((2, 3)) > 0).to(history.dtype)
    return known


HISTORY_MODULES: dict[HistoryMode, type[GatedMean | QFormer]] = {"gates": GatedMean, "qformer": QFormer}
