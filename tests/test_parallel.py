"""Two processes under a real torchrun end where one process with the same batches does."""

import subprocess
import sys
from pathlib import Path

import parallel_run
from safetensors.torch import load_file
from test_loop import read_log

TOLERANCE = 1e-5  # largest difference of a weight after five steps: the order of additions


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    script = str(Path(parallel_run.__file__))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    subprocess.run([*command, str(tmp_path / "two")], check=True, capture_output=True, timeout=120)
    parallel_run.main(tmp_path / "one")
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    # Softmax ignores the bias of keys: its gradient is rounding noise, which Adam turns into steps of full size.
    moved = [name for name in one if not name.endswith("k_proj.bias")]
    assert max((one[name] - two[name]).abs().max().item() for name in moved) < TOLERANCE
    rows = zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True)
    for a, b in rows:
        assert a.keys() == b.keys()
        assert abs(a["loss"] - b["loss"]) < TOLERANCE and abs(a["norm"] - b["norm"]) < TOLERANCE * 100
