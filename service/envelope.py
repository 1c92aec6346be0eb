"""The outermost layer of every request: its id, its limits, its headers, its metrics, its trace and its log line.

Plain ASGI, because it runs for every request: body limit in, headers out, one answer for whatever escaped.
"""

import logging
import random
import re
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.direct import RawHeaders, preceded
from service.limits import RateLimit
from service.problems import Refused, problem, refusal
from service.readiness import Readiness
from service.telemetry import Metrics
from service.tracing import Tracer

MAX_BODY_BYTES = 64 * 1024
_MORE_BODY_BYTES = {
    "/v1/events": 2 * 1024 * 1024,
    "/v1/items:bulk": 4 * 1024 * 1024,
}  # routes that take many things at once
_JSON = b"application/json"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_QUIET = {"/healthz", "/readyz", "/metrics"}
_LIMITED = "/v1/"
_SECURITY = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
_CLOSE = (b"connection", b"close")
logger = logging.getLogger("onesearch.request")


class Envelope:
    """Wraps the app. `scope["state"]` gets `request_id` and `arrived` (`time.monotonic()`).

    Routes may set `variant` and `timings_ms` there, and error handlers the code of a `problem`.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        readiness: Readiness,
        rate_limit: RateLimit | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._readiness = readiness
        self._rate_limit = rate_limit
        self._tracer = tracer
        # Names need no secrecy, and the system's random numbers cost the loop a pause.
        self._random = random.Random()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = given if _REQUEST_ID.fullmatch(given) else f"{self._random.getrandbits(128):032x}"
        state["arrived"] = started
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(message, state)
            await send(message)

        try:
            await self._answer(scope, headers, receive, answer)
        except Exception:
            logger.exception("failed", extra={"fields": {"request_id": state["request_id"]}})
            if status:  # the answer is on its way and cannot be changed; the server closes the connection
                raise
            await problem(state["request_id"], 500, "internal error")(scope, receive, answer)
        finally:
            self._account(scope, headers, status, time.monotonic() - started)

    async def _answer(self, scope: Scope, headers: RawHeaders, receive: Receive, send: Send) -> None:
        request_id = scope["state"]["request_id"]
        if self._rate_limit and scope["path"].startswith(_LIMITED):
            try:
                self._rate_limit.check(scope)
            except Refused as refused:
                scope["state"]["problem"] = refused.code
                await refusal(request_id, refused)(scope, receive, send)
                return
        limit = _MORE_BODY_BYTES.get(scope["path"], MAX_BODY_BYTES)
        body = await _read(headers, receive, limit)
        if body is None or (body and not _is_json(headers)):
            await _unreadable(request_id, body, headers, limit)(scope, receive, send)
            return
        await self._app(scope, preceded({"type": "http.request", "body": body, "more_body": False}, receive), send)

    def _add_headers(self, message: Message, state: MutableMapping[str, Any]) -> None:
        headers: list[tuple[bytes, bytes]] = message["headers"]
        headers.append((b"x-request-id", state["request_id"].encode()))
        if variant := state.get("variant"):
            headers.append((b"x-onesearch-variant", variant.encode()))
        timings = {**state.get("timings_ms", {}), "total": (time.monotonic() - state["arrived"]) * 1e3}
        told = ", ".join([f"{name};dur={spent:.2f}" for name, spent in timings.items()])
        headers.append((b"server-timing", told.encode()))
        headers += _SECURITY
        if self._readiness.draining and _CLOSE not in headers:
            headers.append(_CLOSE)

    def _account(self, scope: Scope, headers: RawHeaders, status: int, seconds: float) -> None:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "unmatched")
        variant = state.get("variant", "")
        self._metrics.request(route, variant, status, seconds)
        if code := state.get("problem"):
            self._metrics.problem(code)
        if self._tracer:
            self._tracer.request(
                headers.get(b"traceparent", b"").decode("latin-1"),
                f"{scope['method']} {route}",
                status,
                seconds,
                state,
            )
        level = logging.DEBUG if route in _QUIET else logging.INFO
        if logger.isEnabledFor(level):
            fields = {
                "request_id": state["request_id"],
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": round(seconds * 1e3, 2),
                "variant": variant,
            }
            logger.log(level, "request", extra={"fields": fields})


async def _read(headers: RawHeaders, receive: Receive, limit: int) -> bytes | None:
    """The body, or None when it is declared or turns out to be too large."""
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        return None
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _is_json(headers: RawHeaders) -> bool:
    return headers.get(b"content-type", b"").partition(b";")[0].strip().lower() == _JSON


def _unreadable(request_id: str, body: bytes | None, headers: RawHeaders, limit: int) -> Response:
    """The problem of a body that is too large (None) or not declared to be JSON."""
    if body is not None:
        given = headers.get(b"content-type", b"").decode("latin-1")
        detail = f"Content-Type: {given!r} is not supported, expected application/json"
        errors = [("Content-Type", "expected application/json")]
        return problem(request_id, 415, detail, code="unsupported-media-type", errors=errors)
    fault = f"is larger than {limit} bytes"
    close = {"Connection": "close"}  # the rest of the body is never read
    return problem(
        request_id, 413, f"the body {fault}", code="body-too-large", errors=[("body", fault)], headers=close
    )
