"""Batches and the plan of a stage: which samples of which task make up every step, decided before the first step.

The plan depends on the seed alone, so a resumed run continues with exactly the batches it would have seen, and
several processes agree on it without talking.

Legend: B rows of this process, S prompt tokens, T target tokens, R behaviours, E history width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onesearch.sequence import Prompt
from training.samples import Sample

_WINDOW = 32  # batches sorted by length together: little padding, still random


class Inputs(NamedTuple):
    """What the model reads: ids, mask int64 [B, S]; history float32 [B, R, 3, E]."""

    ids: Tensor
    mask: Tensor
    history: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt], pad: int) -> Self:
        """Prompts padded to the longest."""
        ids = padded([prompt.ids for prompt in prompts], pad)
        return cls(ids, (ids != pad).long(), torch.from_numpy(np.stack([prompt.history for prompt in prompts])))


@dataclass(frozen=True)
class Batch:
    """One process's share of a step. target int64 [B, T], pad where ended; teacher: the keyword prompts, if any.

    weight float32 [B] and one float32 [B] say what a row counts, over `mass` = Σ weight · tokens and `tokens` of
    the whole batch: Σ weight · loss / mass is its weighted, Σ one · loss / tokens its plain mean over target tokens.
    A process without rows holds one that counts nothing.
    """

    task: str
    prompt: Inputs
    teacher: Inputs | None
    target: Tensor
    weight: Tensor
    one: Tensor
    mass: float
    tokens: int

    def mean(self, losses: Tensor) -> Tensor:
        """This process's part of the weighted mean per target token; losses [B] are sums over a row's tokens."""
        return (losses * self.weight).sum() / self.mass

    def plain_mean(self, losses: Tensor) -> Tensor:
        """The same without weights."""
        return (losses * self.one).sum() / self.tokens


@dataclass(frozen=True)
class PlannedStep:
    """One step: its place in the stage and the samples it trains on."""

    place: int
    task: str
    samples: npt.NDArray[np.int64]


class Sized(Protocol):
    """A sample that knows its number of tokens, so that alike ones are batched together."""

    @property
    def length(self) -> int:
        """Tokens."""
        ...


def plan(
    shares: Mapping[str, float], data: Mapping[str, Sequence[Sized]], steps: int, batch: int, seed: Sequence[int]
) -> list[PlannedStep]:
    """All steps of a stage, each of a task drawn with its share."""
    rng = np.random.default_rng(list(seed))
    tasks = list(shares)
    order = rng.choice(len(tasks), size=steps, p=np.asarray(list(shares.values())))
    streams = {
        task: _stream(_lengths(data[task]), batch, int((order == i).sum()), rng) for i, task in enumerate(tasks)
    }
    return [PlannedStep(place, tasks[i], streams[tasks[i]].pop()) for place, i in enumerate(order.tolist())]


def collate(task: str, samples: Sequence[Sample], pad: int, rank: int = 0, world: int = 1) -> Batch:
    """Every world-th sample from rank on as tensors; `mass` and `tokens` are of all samples."""
    mine = samples[rank::world]
    rows = mine or samples[:1]
    teachers = [s.teacher for s in rows if s.teacher is not None]
    return Batch(
        task=task,
        prompt=Inputs.of([s.prompt for s in rows], pad),
        teacher=Inputs.of(teachers, pad) if teachers else None,
        target=padded([s.target for s in rows], pad),
        weight=torch.tensor([s.weight for s in mine] or [0.0]),
        one=torch.tensor([1.0] * len(mine) or [0.0]),
        mass=sum(s.weight * len(s.target) for s in samples),
        tokens=sum(len(s.target) for s in samples),
    )


def padded(rows: Sequence[npt.NDArray[np.int64]], pad: int) -> Tensor:
    """int64 [B, width of the longest], pad behind each row."""
    table = np.full((len(rows), max(map(len, rows))), pad, dtype=np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return torch.from_numpy(table)


def _lengths(samples: Sequence[Sized]) -> npt.NDArray[np.int64]:
    return np.asarray([s.length for s in samples])


def _stream(
    lengths: npt.NDArray[np.int64], batch: int, count: int, rng: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """`count` batches of sample numbers: whole epochs in random order, similar lengths together within a window."""
    batches: list[npt.NDArray[np.int64]] = []
    while len(batches) < count:
        order = rng.permutation(len(lengths))
        epoch: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(order), batch * _WINDOW):
            window = order[start : start + batch * _WINDOW]
            window = window[np.argsort(lengths[window], kind="stable")]
            epoch += [window[i : i + batch] for i in range(0, len(window), batch)]
        batches += [epoch[i] for i in rng.permutation(len(epoch))]
    return batches[:count]
