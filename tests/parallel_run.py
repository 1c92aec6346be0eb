"""Run by torchrun in test_parallel: a self-distillation stage on a tiny model, its weights in a folder."""

import sys
from pathlib import Path

from test_loop import DATA, RENDERER, planned
from tiny import tiny_model
from torch import nn

from training.distill import SdftObjective
from training.loop import run
from training.parallel import processes
from training.stages import SdftStage

STAGE = SdftStage(
    "s", 5, 5, mixture={"search": 1.0}, kw_mix=0, mode="joint", alpha_r=0.5, epsilon=0.1, gamma=2.0, lr=1e-3
)


def main(folder: Path) -> None:
    model = tiny_model(RENDERER)
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    run(SdftObjective(model, RENDERER, DATA, STAGE), STAGE, planned(STAGE), folder, 3, 2)


if __name__ == "__main__":
    with processes():
        main(Path(sys.argv[1]))
