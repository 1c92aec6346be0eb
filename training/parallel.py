"""Data-parallel training under `torchrun`: every process takes its share of each batch, gradients are summed.

Without torchrun there is one process and everything here does nothing. Losses are divided by the size of the global
batch beforehand, so the sum over processes is the gradient of one process with the whole batch; what remains is the
order of additions (and dropout, which draws other masks).
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

_PATIENCE = timedelta(hours=12)  # others wait while the first process fits identifiers


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; leave them at the end."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Number of this process; 0 writes files and shows progress."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait() -> None:
    """Return when every process has come here."""
    if world() > 1:
        distributed.barrier()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over processes, in one message; a missing one counts as zero."""
    if world() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    for p, part in zip(trained, torch.split_with_sizes(flat, [p.numel() for p in trained]), strict=True):
        p.grad = part.view_as(p)


def sum_values(values: dict[str, float]) -> dict[str, float]:
    """Sum numbers over processes, name by name; every process must have the same names in the same order."""
    if world() == 1:
        return values
    flat: Tensor = torch.tensor(list(values.values()), dtype=torch.float64)
    distributed.all_reduce(flat)
    return dict(zip(values, flat.tolist(), strict=True))


def gather(tensor: Tensor) -> list[Tensor]:
    """The tensor of every process, by rank; all must have one shape."""
    if world() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(world())]
    distributed.all_gather(parts, tensor)
    return parts
