"""Errors over HTTP: every failure becomes one problem+json body (RFC 9457) that names what was wrong.

Nothing but the request id leaves the service when the fault is its own.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from onesearch.errors import DeadlineError, InputError, OneSearchError
from service.schemas import BATCH_FORM, LIST_FORM, SINGLE_FORM

MEDIA_TYPE = "application/problem+json"
# Where FastAPI says a field was found; of no use to the caller.
_PLACES = {"body", "query", "path", "header"}
_FORMS = {SINGLE_FORM, BATCH_FORM, LIST_FORM}
_STATUS_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}


def problem(
    request_id: str,
    status: int,
    detail: str,
    *,
    code: str = "",
    errors: Sequence[tuple[str, str]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem response. code makes the type URI; errors are pairs of field and message."""
    body: dict[str, Any] = {
        "type": f"urn:onesearch:problem:{code}" if code else "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": request_id,
    }
    if errors:
        body["errors"] = [{"field": field, "message": message} for field, message in errors]
    more = {**_STATUS_HEADERS.get(status, {}), **(headers or {})}
    return Response(orjson.dumps(body), status, headers=more, media_type=MEDIA_TYPE)


class HeaderError(InputError):
    """A request header is wrong."""

    status = 400


class NotFound(OneSearchError):
    """What was asked for does not exist."""

    code = "not-found"
    status = 404


class Unauthorized(OneSearchError):
    """The request does not carry the admin key."""

    code = "unauthorized"
    status = 401


class Forbidden(OneSearchError):
    """The service does not allow this to anybody."""

    code = "forbidden"
    status = 403


class Refused(OneSearchError):
    """A request is turned away to keep the service fast for the others; it may be sent again."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        """retry_after: seconds, at least 1 is told."""
        super().__init__(message)
        self.retry_after = max(1, retry_after)


def refusal(request_id: str, refused: Refused) -> Response:
    """The problem of a request that was turned away, with its `Retry-After`."""
    again = {"Retry-After": str(refused.retry_after)}
    return problem(request_id, refused.status, str(refused), code=refused.code, headers=again)


def install(app: FastAPI) -> None:
    """Map every exception a route may raise on purpose; the rest is the envelope's to answer."""
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(OneSearchError, _on_error)
    app.add_exception_handler(HTTPException, _on_http)


def told(state: MutableMapping[str, Any], error: OneSearchError) -> Response:
    """The problem of an error that was raised on purpose, noted in the state of the request's scope.

    Raises the error itself where the fault is the service's own.
    """
    request_id, state["problem"] = state["request_id"], error.code
    if isinstance(error, Refused):
        return refusal(request_id, error)
    if isinstance(error, DeadlineError):
        return problem(request_id, error.status, str(error), code=error.code)
    if error.status >= 500 and error.status != 503:
        raise error
    if error.status == 503:
        return problem(request_id, 503, "a part of the service is away, try again", code=error.code)
    errors = [(error.field, str(error))] if isinstance(error, InputError) else []
    return problem(request_id, error.status, str(error), code=error.code, errors=errors)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        return _not_json(request, f"{found[0]['ctx']['error']} at character {found[0]['loc'][-1]}")
    faults = [(_path(e["loc"]), _message(e)) for e in found]
    detail = "; ".join(f"{field}: {message}" for field, message in faults)
    return problem(_id(request), 422, detail, code=InputError.code, errors=faults)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OneSearchError)
    return told(request.scope["state"], error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # the framework's word for bytes that are no text or nest too deeply
        return _not_json(request, "it cannot be parsed")
    return problem(_id(request), error.status_code, error.detail, headers=error.headers)


def _not_json(request: Request, why: str) -> Response:
    errors = [("body", "is not JSON")]
    return problem(_id(request), 400, f"the body is not JSON: {why}", code="malformed-json", errors=errors)


def _id(request: Request) -> str:
    return str(request.state.request_id)


def _path(location: tuple[int | str, ...]) -> str:
    kept = location[1:] if location and location[0] in _PLACES else location
    kept = tuple(part for part in kept if part not in _FORMS)
    return ".".join(str(part) for part in kept) or "body"


def _message(error: Any) -> str:
    return str(error["msg"]).removeprefix("Value error, ")
