"""The short way to the route that nearly all traffic takes: `POST /v1/search` without the framework's dispatch.

The framework stays in charge of the route: its document describes it, and whatever is not a valid request goes on to
it untouched, so that there is one explanation of what is wrong. Only answers come from here.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onesearch.errors import OneSearchError
from service.problems import told
from service.schemas import SearchRequest

RawHeaders = Mapping[bytes, bytes]
"""Lower-case names and values as they came; of a repeated one the last."""
ANSWER_HEADERS = ((b"content-type", b"application/json"), (b"cache-control", b"no-store"))
Find = Callable[[MutableMapping[str, Any], RawHeaders, SearchRequest], Awaitable[bytes]]


class DirectSearch:
    """Wraps the app, inside the envelope, which sends the whole body in one message."""

    def __init__(self, app: ASGIApp, route: Route, find: Find) -> None:
        """route: the one to serve; find: what answers it, given the state of the scope, with a JSON body."""
        self._app, self._route, self._find = app, route, find

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != self._route.path:
            await self._app(scope, receive, send)
            return
        message = await receive()
        try:
            request = SearchRequest.model_validate(json.loads(message["body"]))
        except (ValueError, RecursionError):
            await self._app(scope, preceded(message, receive), send)
            return
        scope["route"] = self._route
        try:
            body = await self._find(scope["state"], dict(scope["headers"]), request)
        except OneSearchError as error:
            await told(scope["state"], error)(scope, receive, send)
            return
        headers = [*ANSWER_HEADERS, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def preceded(message: Message, receive: Receive) -> Receive:
    """Receives one message again, then what follows."""
    first: Message | None = message

    async def replayed() -> Message:
        nonlocal first
        if first is None:
            return await receive()
        replay, first = first, None
        return replay

    return replayed
