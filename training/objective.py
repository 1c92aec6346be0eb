"""What a stage optimises: the interface of the training loop, and the tools that objectives share."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from onesearch.model import OneSearchModel
from training.batches import PlannedStep
from training.parallel import sum_gradients
from training.recipe import Precision


class Objective(nn.Module):
    """Holds the model and whatever else is trained or remembered; all parameters go into the checkpoints."""

    def __init__(self, model: OneSearchModel, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self._dtype = autocast_dtype(precision)

    def gradients(self, step: PlannedStep) -> dict[str, float]:
        """Leave the gradient of the step's whole batch, over all processes, in `.grad`.

        Gradients are clear on entry. Returns what to log: this process's parts, which sum up over processes; `loss`
        is among them.
        """
        raise NotImplementedError

    def stepped(self) -> None:
        """Called after each optimiser step."""

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of forward passes."""
        return torch.autocast("cpu", dtype=self._dtype or torch.bfloat16, enabled=self._dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient, summed over processes, to what is there."""
        before = [(p, p.grad) for p in self.parameters() if p.grad is not None]
        for p, _ in before:
            p.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        sum_gradients(self.parameters())
        for p, gradient in before:
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """bf16 only where the processor multiplies it natively; elsewhere it is slower than fp32."""
    native = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and native) else None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule's own mode is back afterwards, also after an error."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def perturbed(weight: nn.Parameter, epsilon: float, pad: int) -> Iterator[bool]:
    """FGM (paper §3.3.2): inside, `weight` stands ε · g/‖g‖₂ away, g its gradient without the padding row.

    weight [V, D]; it comes back bit by bit. Yields whether there was a finite, non-zero gradient to follow. The head
    is tied to the embedding, so its rows move too (spec §4.5).
    """
    if weight.grad is None:
        yield False
        return
    direction = weight.grad.detach().float().clone()
    direction[pad] = 0
    norm = direction.norm()
    if not torch.isfinite(norm) or norm == 0:
        yield False
        return
    clean = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(direction, alpha=epsilon / norm.item())
        yield True
    finally:
        with torch.no_grad():
            weight.copy_(clean)
