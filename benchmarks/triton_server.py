"""A real Triton server for tests and benchmarks, from the nvidia-pytriton wheel: CPU only, Python backend only."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

PATIENCE = 60


class NoTriton(RuntimeError):
    """This machine cannot run the server; the message says what is missing."""


class TritonServer:
    """One server over a repository, in explicit model control mode; it may be killed and started again.

    Raises NoTriton where it cannot run.
    """

    def __init__(self, folder: Path, repository: Path, models: tuple[str, ...]) -> None:
        spec = find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise NoTriton("needs the nvidia-pytriton wheel")
        wheel = Path(spec.origin).parent / "tritonserver"
        libraries = sysconfig.get_config_var("LIBDIR")
        self._libraries = [wheel.parents[1] / "nvidia_pytriton.libs", Path(libraries)]
        self._site = sysconfig.get_path("purelib")
        stub = wheel / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
        self._skip_without_python(stub)
        folder.mkdir(exist_ok=True)
        backends = folder / "backends"
        shutil.copytree(wheel / "backends", backends)
        shutil.copy(stub, backends / "python")
        self._log = folder / "triton.log"
        self.ports = dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))
        self._command = [
            str(wheel / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in models),
            *(f"--{name}-port={port}" for name, port in self.ports.items()),
            *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
        ]
        Path(self._command[0]).chmod(0o755)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        """Its gRPC address."""
        return f"127.0.0.1:{self.ports['grpc']}"

    def start(self) -> None:
        """Start the server and wait until it is ready. Raises RuntimeError with its log when it ends instead."""
        environment = {**os.environ, **self._environment()}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        for _ in range(PATIENCE * 20):
            if self._process.poll() is not None:
                raise RuntimeError(f"tritonserver ended:\n{self.log()[-4000:]}")
            if self._healthy():
                return
            time.sleep(0.05)
        raise RuntimeError(f"tritonserver is not ready:\n{self.log()[-4000:]}")

    def kill(self) -> None:
        """End the server and its backend processes at once, as a crash would."""
        assert self._process is not None
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def freeze(self, frozen: bool) -> None:
        """Stop or continue all processes: a server that hangs."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP if frozen else signal.SIGCONT)

    def counted(self, metric: str, model: str) -> float:
        """Sum of one metric over the versions of a model."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['metrics']}/metrics") as response:
            lines = response.read().decode().splitlines()
        rows = [line for line in lines if line.startswith(metric + "{") and f'model="{model}"' in line]
        return sum(float(row.rsplit(" ", 1)[1]) for row in rows)

    def log(self) -> str:
        """What the server has printed."""
        return self._log.read_text("utf-8", "replace")

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['http']}/v2/health/ready") as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def _environment(self) -> dict[str, str]:
        return {
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, self._libraries)),
            "PYTHONPATH": self._site,
            "OMP_NUM_THREADS": "1",
        }

    def _skip_without_python(self, stub: Path) -> None:
        if not stub.exists():
            raise NoTriton(f"the wheel has no backend for this Python: {stub} is missing")
        environment = {**os.environ, **self._environment()}
        linked = subprocess.run(
            ["ldd", str(stub)], env=environment, capture_output=True, text=True, check=False
        ).stdout
        if missing := [line.split()[0] for line in linked.splitlines() if "not found" in line]:
            raise NoTriton(f"the backend needs {', '.join(missing)} (Debian: libpython3.{sys.version_info.minor})")


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()
