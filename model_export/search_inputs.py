"""What the search graph is fed: prompts, masks, and the trie as CSR arrays padded to a capacity.

Trie and eligibility are inputs, so a new catalog needs new arrays and no new graph while it fits the capacity.

Legend: L levels, B requests of a batch, N results, S prompt tokens, V behaviours, E history width, M SIDs, n_t nodes of
level t (n_0 = 1, the root), e_t edges that leave them (e_t = n_{t+1}, e_{L-1} = M).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import orjson

from onesearch.decode import BeamResult
from onesearch.errors import ConfigError, ExportError
from onesearch.sequence import Prompt
from trie import SidTrie

_HEADROOM = 1.5
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TrieArrays:
    """A trie as CSR: children of node i of level t are edges first[t][i] … first[t][i + 1], with codes[t].

    first: per level int32 [n_t + 1]; codes: per level int32 [e_t], ascending within a node. An edge of level t is a
    node of level t + 1; an edge of the last level is a leaf index.
    """

    first: tuple[Ints, ...]
    codes: tuple[Ints, ...]

    @classmethod
    def of(cls, trie: SidTrie) -> Self:
        """The arrays of a trie."""
        sids = trie.sids().astype(np.int32)
        first: list[Ints] = []
        codes: list[Ints] = []
        parent = np.zeros(len(sids), dtype=np.int64)
        nodes = 1
        for level in range(trie.levels):
            opens = np.ones(len(sids), dtype=np.bool_)
            opens[1:] = (sids[1:, : level + 1] != sids[:-1, : level + 1]).any(axis=1)
            first.append(np.searchsorted(parent[opens], np.arange(nodes + 1)).astype(np.int32))
            codes.append(sids[opens, level])
            parent, nodes = np.cumsum(opens) - 1, int(opens.sum())
        return cls(tuple(first), tuple(codes))

    def degrees(self, level: int) -> npt.NDArray[np.int64]:
        """Children of each node of a level, largest first."""
        first = self.first[level].astype(np.int64)
        return np.sort(first[1:] - first[:-1])[::-1]


@dataclass(frozen=True)
class SearchShape:
    """Everything static about a search graph.

    edges: per level, edges there is room for. A beam's children are read in chunks of `chunk[t]`, a power of two
    near the mean degree of the largest nodes; `chunks[t]` is how many chunks any set of beams can have, so all
    children are always read and padding stays within a small factor, also where degrees differ wildly.
    """

    batch: int
    width: int
    top_n: int
    prompt: int
    sizes: tuple[int, ...]
    edges: tuple[int, ...]
    chunk: tuple[int, ...]
    chunks: tuple[int, ...]

    @classmethod
    def fit(cls, trie: SidTrie, batch: int, width: int, top_n: int, prompt: int) -> Self:
        """Room for a trie and half as much again. Raises ConfigError for an empty trie or top_n above the width."""
        if not trie.num_sids:
            raise ConfigError("search graph: the trie holds no SIDs")
        if not 1 <= top_n <= width or batch < 1:
            raise ConfigError(f"search graph: batch {batch}, width {width}, top_n {top_n} do not fit together")
        arrays = TrieArrays.of(trie)
        edges: list[int] = []
        chunk: list[int] = []
        chunks: list[int] = []
        beams = 1
        for level, size in enumerate(trie.sizes):
            room = 1 if level == 0 else edges[-1]
            edges.append(min(_roomy(len(arrays.codes[level])), room * size))
            largest = arrays.degrees(level)[:beams]
            step = 1 << int(np.ceil(np.log2(largest.mean())))
            chunk.append(step)
            needed = int((-(-largest // step)).sum())
            chunks.append(min(max(_roomy(needed), beams), beams * -(-size // step)))
            beams = min(width, chunks[-1] * step)
        return cls(batch, width, min(top_n, beams), prompt, trie.sizes, tuple(edges), tuple(chunk), tuple(chunks))

    def faults(self, arrays: TrieArrays) -> list[str]:
        """Why a trie does not fit, one line per level and reason; empty when it fits."""
        faults = []
        beams = 1
        for level, (edges, step, chunks) in enumerate(zip(self.edges, self.chunk, self.chunks, strict=True)):
            found = len(arrays.codes[level])
            if found > edges:
                faults.append(f"level {level}: {found} edges, the graph has room for {edges}")
            needed = int((-(-arrays.degrees(level)[:beams] // step)).sum())
            if needed > chunks:
                faults.append(
                    f"level {level}: {needed} chunks of {step} children, the graph has room for {chunks}"
                )
            beams = min(self.width, chunks * step)
        return faults

    def trie_feeds(self, trie: SidTrie) -> dict[str, Ints]:
        """The trie inputs, padded. Raises ExportError listing every level that does not fit, or other sizes."""
        arrays = TrieArrays.of(trie)
        faults = self.faults(arrays)
        if trie.sizes != self.sizes:
            faults = [f"codebook sizes are {trie.sizes}, the graph was made for {self.sizes}"]
        if faults:
            raise ExportError("search graph", faults)
        feeds = {}
        for level, edges in enumerate(self.edges):
            nodes = 1 if level == 0 else self.edges[level - 1]
            first, codes = arrays.first[level], arrays.codes[level]
            feeds[f"first_{level}"] = np.pad(first, (0, nodes + 1 - len(first)), mode="edge")
            feeds[f"codes_{level}"] = np.pad(codes, (0, edges - len(codes)))
        return feeds

    def request_feeds(
        self, prompts: Sequence[Prompt], masks: Sequence[npt.NDArray[np.bool_] | None], num_sids: int
    ) -> dict[str, npt.NDArray[Any]]:
        """The request inputs of up to B prompts; masks are bool [M] by leaf index, None for all SIDs.

        Rows beyond the last prompt repeat it with nothing eligible. Raises ConfigError for too many prompts or one
        that is too long.
        """
        longest = max(len(prompt.ids) for prompt in prompts)
        if len(prompts) > self.batch or longest > self.prompt:
            raise ConfigError(
                f"search graph: {len(prompts)} prompts of up to {longest} tokens, made for {self.batch} of "
                f"{self.prompt}"
            )
        ids = np.zeros((self.batch, self.prompt), dtype=np.int64)
        mask = np.zeros_like(ids)
        eligible = np.zeros((self.batch, self.edges[-1]), dtype=np.bool_)
        history = np.zeros((self.batch, *prompts[0].history.shape), dtype=np.float32)
        for row in range(self.batch):
            prompt = prompts[min(row, len(prompts) - 1)]
            ids[row, : len(prompt.ids)], mask[row, : len(prompt.ids)] = prompt.ids, 1
            history[row] = prompt.history
            if row < len(prompts):
                legal = masks[row]
                eligible[row, :num_sids] = True if legal is None else legal
        return {"ids": ids, "mask": mask, "history": history, "eligible": eligible}

    def save(self, path: Path) -> None:
        """Write the shape beside its graph."""
        path.write_bytes(orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `save`."""
        raw: dict[str, Any] = orjson.loads(path.read_bytes())
        values: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
        return cls(**values)


def results(
    codes: npt.NDArray[np.int32], scores: npt.NDArray[np.float32], leaves: npt.NDArray[np.int32]
) -> list[BeamResult]:
    """The graph's outputs [B, N, L], [B, N], [B, N] as results of the decode loop: padding (-inf) removed."""
    found = []
    for row, valid in enumerate(np.isfinite(scores)):
        kept = codes[row][valid].astype(np.uint16), scores[row][valid], leaves[row][valid].astype(np.int64)
        found.append(BeamResult(*kept, ()))
    return found


def _roomy(count: int) -> int:
    return int(np.ceil(count * _HEADROOM))
