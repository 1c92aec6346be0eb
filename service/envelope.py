"""The outermost layer of every request: its id, its size limit, its headers, its metrics and its log line.

Plain ASGI, because it runs for every request: body limit in, headers out, one answer for whatever escaped.
"""

import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import problem
from service.telemetry import Metrics

MAX_BODY_BYTES = 64 * 1024
_JSON = "application/json"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_QUIET = {"/healthz", "/readyz", "/metrics"}
_SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
logger = logging.getLogger("onesearch.request")


class Envelope:
    """Wraps the app. `scope["state"]` gets `request_id`; routes may set `variant` and `timings_ms` there."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message, state, started)
            await send(message)

        try:
            await self._answer(scope, receive, answer)
        except Exception:
            logger.exception("failed", extra={"fields": {"request_id": state["request_id"]}})
            if status:  # the answer is on its way and cannot be changed; the server closes the connection
                raise
            await problem(state["request_id"], 500, "internal error")(scope, receive, answer)
        finally:
            self._account(scope, status, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        body = await _read(headers, receive)
        if body is None or (body and not _is_json(headers)):
            await _refusal(scope["state"]["request_id"], body, headers)(scope, receive, send)
            return
        delivered = False

        async def replayed() -> Message:
            nonlocal delivered
            if delivered:
                return await receive()
            delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replayed, send)

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        variant = scope["state"].get("variant", "")
        self._metrics.request(route, variant, status, seconds)
        fields = {
            "request_id": scope["state"]["request_id"],
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1e3, 2),
            "variant": variant,
        }
        logger.log(logging.DEBUG if route in _QUIET else logging.INFO, "request", extra={"fields": fields})


async def _read(headers: Headers, receive: Receive) -> bytes | None:
    """The body, or None when it is declared or turns out to be too large."""
    declared = headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        return None
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _is_json(headers: Headers) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() == _JSON


def _refusal(request_id: str, body: bytes | None, headers: Headers) -> Response:
    """The problem of a body that is too large (None) or not declared to be JSON."""
    if body is not None:
        detail = f"Content-Type: {headers.get('content-type', '')!r} is not supported, expected {_JSON}"
        errors = [("Content-Type", f"expected {_JSON}")]
        return problem(request_id, 415, detail, code="unsupported-media-type", errors=errors)
    fault = f"is larger than {MAX_BODY_BYTES} bytes"
    close = {"Connection": "close"}  # the rest of the body is never read
    return problem(
        request_id, 413, f"the body {fault}", code="body-too-large", errors=[("body", fault)], headers=close
    )


def _add_headers(message: Message, state: MutableMapping[str, Any], started: float) -> None:
    headers = MutableHeaders(scope=message)
    headers["X-Request-Id"] = state["request_id"]
    if variant := state.get("variant"):
        headers["X-OneSearch-Variant"] = variant
    timings = {**state.get("timings_ms", {}), "total": (time.perf_counter() - started) * 1e3}
    headers["Server-Timing"] = ", ".join(f"{name};dur={spent:.2f}" for name, spent in timings.items())
    for name, value in _SECURITY.items():
        headers[name] = value
