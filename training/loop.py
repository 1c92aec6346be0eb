"""The one training loop of every kind of stage: schedule, checkpoints with exact resume, log, curve.

A stage's folder holds `log.jsonl` (one object per step), `checkpoint/` (replaced atomically) and, when finished,
`weights.safetensors` and `loss.png`. Killed at any moment, the same call continues from the last checkpoint and
ends with the same weights as an uninterrupted run (same machine, same thread count, same number of processes).
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onesearch.arrays import write_atomically
from onesearch.errors import DivergedError
from onesearch.progress import Meter
from training.batches import PlannedStep
from training.objective import Objective
from training.parallel import gather, rank, sum_values, wait
from training.stages import StageConfig

_FLOOR = 0.1  # the cosine ends at this share of the learning rate
_LAST = 100  # steps that the reported losses are a mean of


def run(
    objective: Objective,
    stage: StageConfig,
    steps: Sequence[PlannedStep],
    folder: Path,
    seed: int,
    checkpoint_every: int,
) -> dict[str, float]:
    """Train `objective` in place over all steps, save the model, and return the mean loss per task at the end.

    checkpoint_every is in steps. The optimiser is AdamW, fresh for every stage. Raises DivergedError when the loss is
    not finite.
    """
    torch.manual_seed(seed + 7919 * rank())
    folder.mkdir(parents=True, exist_ok=True)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, betas=(0.9, 0.98), eps=1e-9)
    done = _resume(objective, optimiser, folder)
    objective.train()
    with Meter(stage.name, len(steps), done) as meter:
        for number in range(done, len(steps)):
            row = _step(objective, optimiser, stage, steps[number], trained)
            if rank() == 0:
                with (folder / "log.jsonl").open("ab") as log:
                    log.write(orjson.dumps({"step": number, **row}) + b"\n")
            if (number + 1) % checkpoint_every == 0 or number + 1 == len(steps):
                _save(objective, optimiser, folder, number + 1)
            meter.advance(note=f"{row['task']} loss {row['loss']:.3f}")
    objective.eval()
    if rank() == 0:
        plot_losses(read_log(folder), folder / "loss.png")
        objective.model.save_weights(folder / "weights.safetensors")
    wait()
    return summary(folder)


def _step(
    objective: Objective,
    optimiser: torch.optim.Optimizer,
    stage: StageConfig,
    step: PlannedStep,
    trained: Sequence[nn.Parameter],
) -> dict[str, Any]:
    """One optimiser step; returns its log row."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(stage, step.place)
        group["weight_decay"] = stage.weight_decay
    optimiser.zero_grad(set_to_none=True)
    values = sum_values(objective.gradients(step))
    if not math.isfinite(values["loss"]):
        raise DivergedError(f"stage {stage.name}: the loss is {values['loss']} at step {step.place}")
    norm = nn.utils.clip_grad_norm_(trained, stage.clip)
    optimiser.step()
    objective.stepped()
    return {"stage": stage.name, "task": step.task, **values, "norm": norm.item()}


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


def _save(objective: nn.Module, optimiser: torch.optim.Optimizer, folder: Path, done: int) -> None:
    """Write parameters, optimiser and the random state of every process, then swap the checkpoint folder."""
    random = gather(torch.get_rng_state())
    if rank() > 0:
        return
    tensors = {f"model.{name}": tensor for name, tensor in _named_parameters(objective).items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value.clone() for name, value in state.items()}
    tensors |= {f"random.{i}": state for i, state in enumerate(random)}
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


def _resume(objective: nn.Module, optimiser: torch.optim.Optimizer, folder: Path) -> int:
    """Restore the newest checkpoint, if any; returns the steps already done."""
    found = [folder / name for name in ("checkpoint", "checkpoint.old") if (folder / name / "done.json").exists()]
    if not found:
        if rank() == 0:
            (folder / "log.jsonl").unlink(missing_ok=True)
        wait()
        return 0
    path = found[0]
    tensors = load_file(path / "state.safetensors")
    with torch.no_grad():
        for key, parameter in _named_parameters(objective).items():
            parameter.copy_(tensors[f"model.{key}"])
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, field = key.split(".")
            states.setdefault(int(index), {})[field] = value
    optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})
    if f"random.{rank()}" in tensors:  # more processes than before start from their seeds
        torch.set_rng_state(tensors[f"random.{rank()}"])
    steps: int = json.loads((path / "done.json").read_text())["steps"]
    if rank() == 0:
        lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)[:steps]  # what will be done again
        write_atomically(folder / "log.jsonl", b"".join(lines))
    wait()
    return steps


def _named_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Distinct parameters by name; tied weights appear once."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def summary(folder: Path) -> dict[str, float]:
    """Mean loss per task over the last steps of a stage."""
    tail = read_log(folder)[-_LAST:]
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
