"""The whole search as one graph: prefill, one step per level, candidates from the trie, selection, parents.

Nothing leaves the device between the prompt and the results and every shape is static, so a CUDA graph or a TensorRT
engine can hold the search. Trie and eligibility are inputs (`search_inputs`). Scores are `level` scores; results,
ties included, are those of `onesearch.decode.beam_search`.

    search.onnx   ids [B, S], mask [B, S], history [B, V, 3, E], eligible [B, M], first_* [n_t + 1], codes_* [e_t]
                  -> codes [B, N, L], scores [B, N], leaves [B, N]; a row without a result has score -inf

Legend: as in `search_inputs`; K beams, R chunks of children, W children of a chunk, C = R·W candidates.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_export.search_inputs import SearchShape
from model_export.to_onnx import write_graph
from onesearch.model import OneSearchModel, Prefill, Step


class SearchGraph(nn.Module):
    """The search of a batch: one request's search, mapped over the batch."""

    def __init__(self, model: OneSearchModel, shape: SearchShape) -> None:
        super().__init__()
        self.shape, self.config = shape, model.config
        self.prefill, self.step = Prefill(model), Step(model)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        history: Tensor,
        eligible: Tensor,
        first: list[Tensor],
        codes: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """int64 [B, S] twice, float32 [B, V, 3, E], bool [B, M], the trie int32 → codes int32 [B, N, L], scores float32
        [B, N] descending, leaves int32 [B, N]."""
        first, codes = ([part.long() for part in parts] for parts in (first, codes))
        mapped: Any = torch.vmap(self._search, (0, 0, 0, 0, None, None))
        found: tuple[Tensor, Tensor, Tensor] = mapped(ids, mask, history, eligible, first, codes)
        return found

    def _search(
        self,
        ids: Tensor,
        mask: Tensor,
        history: Tensor,
        eligible: Tensor,
        first: list[Tensor],
        codes: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        config, shape = self.config, self.shape
        context = self.prefill(ids[None], mask[None], history[None])
        # TensorRT sums floats only; float32 counts exactly up to 16.7 M SIDs.
        counted = torch.cat([eligible.new_zeros(1).float(), eligible.float().cumsum(0)])
        state = [context[0].new_zeros(0, 1, config.state_width)] * (2 * config.decoder_layers)
        tokens = ids.new_full((1,), config.bos)
        parents, nodes = torch.zeros_like(tokens), torch.zeros_like(tokens)
        scores, path = torch.zeros_like(tokens, dtype=torch.float32), tokens.new_zeros(1, 0)
        for level in range(len(shape.sizes)):
            head = torch.arange(*config.sids.level_range(level), device=ids.device)
            logits, state = self.step(tokens, parents, head, context, state)
            beam, child, valid = self._children(level, nodes, scores, first[level])
            valid = valid & _reachable(child, first[level + 1 :], counted)
            code = codes[level][child]
            total = scores[beam] + torch.log_softmax(logits, dim=-1)[beam, code]
            total = torch.where(valid, total, -torch.inf).flatten()
            kept = _best(total, min(shape.width, len(total)))
            scores, parents, nodes = total[kept], beam.expand_as(child).flatten()[kept], child.flatten()[kept]
            chosen = code.flatten()[kept]
            tokens, path = chosen + head[0], torch.cat([path[parents], chosen[:, None]], dim=1)
        order = _descending(scores, shape.top_n)
        return path[order].int(), scores[order], nodes[order].int()

    def _children(self, level: int, nodes: Tensor, scores: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All children of the nodes [K], in code order: their beam [R, 1], edge [R, W] and whether they are any."""
        step, rows = self.shape.chunk[level], torch.arange(self.shape.chunks[level], device=nodes.device)
        start = first[nodes]
        degree = torch.where(scores > -torch.inf, first[nodes + 1] - start, 0)
        count = torch.floor((degree + step - 1).float() / step)
        end = count.cumsum(0).long()
        beam = (rows[:, None] >= end).sum(1)
        used, beam = beam < len(nodes), torch.minimum(beam, beam.new_tensor(len(nodes) - 1))
        offset = (rows - (end - count.long())[beam]) * step
        inside = offset[:, None] + torch.arange(step, device=nodes.device)
        valid = used[:, None] & (inside < degree[beam][:, None])
        return beam[:, None], torch.where(valid, start[beam][:, None] + inside, 0), valid


def _reachable(edges: Tensor, deeper: list[Tensor], counted: Tensor) -> Tensor:
    """Whether an eligible SID lies behind each edge; counted [M + 1] holds the eligible SIDs before each leaf."""
    low, high = edges, edges + 1
    for first in deeper:
        low, high = first[low], first[high]
    return counted[high] > counted[low]


def _best(total: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest of total [C], ascending; of equals the first. No order of `topk` matters."""
    positions = torch.arange(len(total), device=total.device)
    if count == len(total):
        return positions
    least = torch.topk(total, count).values[-1]
    above, equal = total > least, total == least
    kept = above | (equal & (equal.float().cumsum(0) <= count - above.sum()))
    return len(total) - torch.topk(torch.where(kept, len(total) - positions, 0).float(), count).values.long()


def _descending(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest scores [K], descending; of equals the first comes first."""
    places = torch.arange(len(scores), device=scores.device)
    before = (scores > scores[:, None]) | ((scores == scores[:, None]) & (places < places[:, None]))
    return torch.topk(len(scores) - before.sum(1).float(), count).indices


def export_search(model: OneSearchModel, shape: SearchShape, path: Path) -> None:
    """Write search.onnx and its shape beside it, as search.json."""
    config, levels = model.config, range(len(shape.sizes))
    ids = torch.full((shape.batch, shape.prompt), config.bos)
    nodes = (1, *shape.edges[:-1])
    inputs = (
        ids,
        torch.ones_like(ids),
        torch.zeros(shape.batch, *config.history_shape),
        torch.ones(shape.batch, shape.edges[-1], dtype=torch.bool),
        [torch.zeros(nodes[level] + 1, dtype=torch.int32) for level in levels],
        [torch.zeros(shape.edges[level], dtype=torch.int32) for level in levels],
    )
    trie = [f"{part}_{level}" for part in ("first", "codes") for level in levels]
    names = ["ids", "mask", "history", "eligible", *trie]
    write_graph(SearchGraph(model, shape), inputs, None, names, ["codes", "scores", "leaves"], path)
    shape.save(path.with_suffix(".json"))
