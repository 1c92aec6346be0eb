"""The HTTP protocol: an answer is one write, and nothing is held longer than a turn of the event loop."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from service.protocol import JoinedWrites, Protocol

LARGE = b"x" * 3_000_000


class Wire(asyncio.Transport):
    """A transport that remembers what it was told to do."""

    def __init__(self) -> None:
        super().__init__({"peername": ("::1", 7)})
        self.acts: list[bytes | str] = []

    def write(self, data: Any) -> None:
        self.acts.append(bytes(data))

    def close(self) -> None:
        self.acts.append("close")

    def is_closing(self) -> bool:
        return "close" in self.acts


async def written(*acts: bytes | str) -> list[bytes | str]:
    """What reaches the wire when these writes and closings happen in one turn."""
    wire = Wire()
    joined = JoinedWrites(wire, asyncio.get_running_loop())
    for act in acts:
        if isinstance(act, str):
            joined.close()
        else:
            joined.write(act)
    held = list(wire.acts)
    await asyncio.sleep(0)
    assert wire.acts[: len(held)] == held
    return wire.acts


def test_writes_of_one_turn_are_one_and_a_closing_comes_after_them() -> None:
    assert asyncio.run(written(b"head", b"body", b"more")) == [b"headbodymore"]
    assert asyncio.run(written(b"head", b"body", "close")) == [b"headbody", "close"]
    assert asyncio.run(written("close", b"too late")) == ["close"]


def test_every_turn_sends_what_is_its_own_and_the_rest_is_the_transports() -> None:
    async def turns() -> None:
        wire = Wire()
        joined = JoinedWrites(wire, asyncio.get_running_loop())
        for part in (b"one", b"two"):
            joined.write(part)
            assert part not in wire.acts
            await asyncio.sleep(0)
            assert wire.acts[-1] == part
        assert joined.get_extra_info("peername") == ("::1", 7)

    asyncio.run(turns())


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers `/stream` in two parts, the second one when the client has said that it has the first."""
    if scope["type"] != "http":
        return
    path = scope["path"]
    whole = {"/large": LARGE, "/empty": b""}.get(path)
    headers = [] if whole is None else [(b"content-length", b"%d" % len(whole))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if path == "/stream":
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        while not seen.is_set():
            await asyncio.sleep(0.001)
    await send({"type": "http.response.body", "body": b"last" if whole is None else whole})


seen = threading.Event()


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a real server."""
    config = uvicorn.Config(app, port=0, http=Protocol, loop=request.param, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def read_until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        part = connection.recv(1 << 20)
        assert part, data[-200:]
        data += part
    return data


def test_a_part_of_a_stream_arrives_before_the_next_is_made(port: int) -> None:
    seen.clear()
    with connect(port) as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"5\r\nfirst\r\n" in read_until(connection, b"first\r\n")
        seen.set()
        assert read_until(connection, b"0\r\n\r\n") == b"4\r\nlast\r\n0\r\n\r\n"


def test_requests_on_one_connection_are_answered_in_order_whatever_their_size(port: int) -> None:
    with connect(port) as connection:
        asked = [b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n", b"HEAD /large HTTP/1.1\r\nHost: a\r\n\r\n"]
        connection.sendall(b"".join(asked))  # pipelined
        large = read_until(connection, b"\r\n\r\n")
        head, _, rest = large.partition(b"\r\n\r\n")
        assert b"3000000" in head
        assert rest.startswith(LARGE) and rest[len(LARGE) :].startswith(b"HTTP/1.1 200 OK")
        connection.sendall(b"GET /empty HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b"content-length: 0" in read_until(connection, b"\r\n\r\n")
        assert connection.recv(1) == b""


def test_a_client_that_leaves_halfway_harms_nobody(port: int) -> None:
    for _ in range(5):
        with connect(port) as connection:
            connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"last" in read_until(connection, b"0\r\n\r\n")
