"""The one training loop: schedule, precision, checkpoints with exact resume, log, curve.

A run folder holds `log.jsonl` (one object per step), `checkpoint/` (replaced atomically) and, when finished,
`weights.safetensors` and `loss.png`. Killed at any moment, the same call continues from the last checkpoint and
ends with the same weights as an uninterrupted run (same machine, same thread count).
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onesearch.arrays import write_atomically
from training.batches import PlannedStep
from training.progress import Meter
from training.recipe import Precision, StageConfig

LossFn = Callable[[PlannedStep], Tensor]
_FLOOR = 0.1  # the cosine ends at this share of the learning rate


@dataclass(frozen=True)
class LoopConfig:
    """seed decides the result, with the number of torch threads; checkpoint_every is in steps."""

    seed: int
    precision: Precision
    checkpoint_every: int


def run(
    model: nn.Module,
    stages: Sequence[StageConfig],
    steps: Sequence[PlannedStep],
    loss_of: LossFn,
    folder: Path,
    config: LoopConfig,
) -> dict[str, float]:
    """Train `model` in place over all planned steps and return the mean loss per task of the last stage."""
    torch.manual_seed(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    done = _resume(model, optimiser, folder)
    model.train()
    dtype = _autocast_dtype(config.precision)
    with Meter("train", len(steps), done) as meter, (folder / "log.jsonl").open("ab") as log:
        for number in range(done, len(steps)):
            step = steps[number]
            stage = stages[step.stage]
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(stage, step.place)
                group["weight_decay"] = stage.weight_decay
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = loss_of(step)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
            optimiser.step()
            row = {
                "step": number,
                "stage": stage.name,
                "task": step.task,
                "loss": loss.item(),
                "norm": norm.item(),
            }
            log.write(orjson.dumps(row) + b"\n")
            if (number + 1) % config.checkpoint_every == 0 or number + 1 == len(steps):
                log.flush()
                _save(model, optimiser, folder, number + 1)
            meter.advance(note=f"{stage.name}/{step.task} loss {row['loss']:.3f}")
    model.eval()
    return _finish(folder, stages[-1].name)


def learning_rate(stage: StageConfig, place: int) -> float:
    """Linear warm-up over a share of the stage, then a cosine to a tenth."""
    warmup = max(1, round(stage.warmup * stage.steps))
    if place < warmup:
        return stage.lr * (place + 1) / warmup
    progress = (place - warmup) / max(1, stage.steps - warmup)
    return stage.lr * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Rows of the step log, one per step in order."""
    return [orjson.loads(line) for line in (folder / "log.jsonl").read_bytes().splitlines()]


def _autocast_dtype(precision: Precision) -> torch.dtype | None:
    """bf16 only where the processor multiplies it natively; elsewhere it is slower than fp32."""
    native = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and native) else None


def _save(model: nn.Module, optimiser: torch.optim.Optimizer, folder: Path, done: int) -> None:
    """Write model, optimiser and random state, then swap the checkpoint folder."""
    tensors = {f"model.{name}": tensor for name, tensor in _named_parameters(model).items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value.clone() for name, value in state.items()}
    tensors["random"] = torch.get_rng_state()
    fresh, current = folder / "checkpoint.new", folder / "checkpoint"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    save_file(tensors, fresh / "state.safetensors")
    (fresh / "done.json").write_text(json.dumps({"steps": done}))
    old = folder / "checkpoint.old"
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        current.rename(old)
    fresh.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def _resume(model: nn.Module, optimiser: torch.optim.Optimizer, folder: Path) -> int:
    """Restore the newest checkpoint, if any; returns the steps already done."""
    found = [folder / name for name in ("checkpoint", "checkpoint.old") if (folder / name / "done.json").exists()]
    if not found:
        (folder / "log.jsonl").unlink(missing_ok=True)
        return 0
    path = found[0]
    tensors = load_file(path / "state.safetensors")
    with torch.no_grad():
        for key, parameter in _named_parameters(model).items():
            parameter.copy_(tensors[f"model.{key}"])
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, field = key.split(".")
            states.setdefault(int(index), {})[field] = value
    optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random"])
    steps: int = json.loads((path / "done.json").read_text())["steps"]
    lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)[:steps]  # drop what will be done again
    write_atomically(folder / "log.jsonl", b"".join(lines))
    return steps


def _named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Distinct parameters by name; tied weights appear once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _finish(folder: Path, last_stage: str) -> dict[str, float]:
    rows = read_log(folder)
    plot_losses(rows, folder / "loss.png")
    tail = [row for row in rows if row["stage"] == last_stage][-100:]
    tasks = dict.fromkeys(row["task"] for row in tail)
    return {task: _mean([row["loss"] for row in tail if row["task"] == task]) for task in tasks}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def plot_losses(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss per step, one line per task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        axes.plot([row["step"] for row in mine], [row["loss"] for row in mine], label=task, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
