"""Processes that serve: one that drains before it stops, or several that share a port under a supervisor.

Workers map the same bundle files, so their pages are in memory once; models, caches and queues are each worker's
own. A worker that dies is replaced; workers whose supervisor dies drain and stop.
"""

import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.process import parent_process
from pathlib import Path
from socket import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client.multiprocess import mark_process_dead

from onesearch.command import REFUSED
from onesearch.errors import OneSearchError
from service.app import create_app
from service.deployment import open_deployment
from service.protocol import Protocol
from service.readiness import Readiness
from service.settings import Settings
from service.store import open_store
from service.telemetry import SHARED_FOLDER, log_config

_RESTART_PAUSE = 1.0
_SPAWN = multiprocessing.get_context("spawn")


class DrainingServer(uvicorn.Server):
    """On the first signal it tells that it is not ready and serves on, so that a load balancer can turn away.

    After the notice it closes the port and finishes what runs; a second signal cuts the notice short.
    """

    def __init__(self, config: uvicorn.Config, readiness: Readiness, notice_seconds: float) -> None:
        super().__init__(config)
        self._readiness = readiness
        self._notice = notice_seconds
        self._closes_at: float | None = None

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Open the port, unless it is the supervisor's, and say so."""
        await super().startup(sockets)
        if sockets is None:
            port = self.servers[0].sockets[0].getsockname()[1]
            print(f"onesearch serves on http://{self.config.host}:{port}", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal arrived."""
        self._readiness.draining = True
        if self._closes_at is not None:
            super().handle_exit(sig, frame)
        else:
            self._closes_at = time.monotonic() + self._notice

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop now; asked ten times a second."""
        if self._closes_at is not None and time.monotonic() >= self._closes_at:
            self.should_exit = True
        return await super().on_tick(counter)


def open_app(bundles: Sequence[Path], settings: Settings) -> FastAPI:
    """The app over opened bundles and store. Raises OneSearchError with every fault."""
    return create_app(settings, open_deployment(bundles, settings), open_store(settings))


def server_config(app: FastAPI | None, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves an app (None: nothing yet, the port is only bound)."""
    return uvicorn.Config(
        app or FastAPI,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=Protocol,
        log_config=log_config(settings.log_level),
        access_log=False,  # it would log query strings, and with them what users typed
        server_header=False,
        timeout_graceful_shutdown=settings.drain_seconds,
    )


def serve_app(app: FastAPI, settings: Settings, sockets: list[socket] | None = None) -> None:
    """Serve until a signal, then drain."""
    gc.collect()
    gc.freeze()  # what is open now stays, so no collection looks at it again: one that did would stop every search
    server = DrainingServer(server_config(app, settings), app.state.readiness, settings.notice_seconds)
    try:
        server.run(sockets)
    finally:
        gc.unfreeze()  # else what is frozen outlives the interpreter's last collection and is reported as leaked


class Supervisor:
    """Runs `settings.workers` worker processes on one listening socket."""

    def __init__(self, bundles: Sequence[Path], settings: Settings) -> None:
        self._bundles, self._settings = bundles, settings
        self._workers: dict[int, SpawnProcess] = {}
        self._stopping = threading.Event()

    def run(self) -> int:
        """Serve until a signal has stopped every worker, or one refused to start; the exit status."""
        listening = server_config(None, self._settings).bind_socket()
        for caught in (signal.SIGTERM, signal.SIGINT):
            signal.signal(caught, self._stop)
        with tempfile.TemporaryDirectory(prefix="onesearch-metrics-") as folder:
            os.environ[SHARED_FOLDER] = folder
            for number in range(self._settings.workers):
                self._start(number, listening)
            status = 0
            while self._workers:
                for number, worker in self._ended():
                    mark_process_dead(worker.pid, folder)  # type: ignore[no-untyped-call]
                    if worker.exitcode == REFUSED:
                        status = REFUSED
                        self._stop()
                    elif not self._stopping.wait(_RESTART_PAUSE):
                        self._start(number, listening)
        listening.close()
        return status

    def _start(self, number: int, listening: socket) -> None:
        arguments = (number, tuple(self._bundles), self._settings, listening)
        worker = _SPAWN.Process(target=_work, args=arguments, name=f"worker-{number}")
        worker.start()
        self._workers[number] = worker

    def _ended(self) -> list[tuple[int, SpawnProcess]]:
        """Wait for workers to end; they are forgotten here."""
        ended = wait([worker.sentinel for worker in self._workers.values()])
        found = [(n, worker) for n, worker in self._workers.items() if worker.sentinel in ended]
        for number, worker in found:
            worker.join()
            del self._workers[number]
        return found

    def _stop(self, sig: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        self._stopping.set()
        for worker in self._workers.values():
            worker.terminate()


def _work(number: int, bundles: Sequence[Path], settings: Settings, listening: socket) -> None:
    """The life of one worker."""
    threading.Thread(target=_follow_supervisor, daemon=True).start()
    try:
        app = open_app(bundles, settings)
    except OneSearchError as error:
        if number == 0:
            print(f"onesearch-serve: {error}", file=sys.stderr)
        raise SystemExit(REFUSED) from error
    serve_app(app, settings, [listening])


def _follow_supervisor() -> None:
    supervisor = parent_process()
    if supervisor is not None:
        supervisor.join()
        os.kill(os.getpid(), signal.SIGTERM)
