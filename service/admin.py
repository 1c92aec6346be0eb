"""The routes that change the catalog. They need the admin key; without one configured they do nothing."""

import hmac
from typing import Annotated, cast

import orjson
from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from service.item_schemas import BulkAnswer, BulkRequest, Changed, ItemFields, LiveItem
from service.items import Items
from service.pipeline import Pipeline
from service.problems import Forbidden, NotFound, Unauthorized
from service.routes import answers

_JSON = "application/json"
_bearer = HTTPBearer(auto_error=False, description="the key of ONESEARCH_ADMIN_KEY")
ItemIdPath = Annotated[int, Path(ge=0, le=2**63 - 1)]


async def _admin(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    """Raises Forbidden while no key is configured, Unauthorized unless the request carries it."""
    key: SecretStr | None = request.state.admin_key
    if key is None:
        raise Forbidden("the catalog cannot be changed: the service has no admin key (ONESEARCH_ADMIN_KEY)")
    if given is None or not hmac.compare_digest(given.credentials.encode(), key.get_secret_value().encode()):
        raise Unauthorized("the admin key is missing or wrong, expected Authorization: Bearer KEY")


router = APIRouter(tags=["catalog"], dependencies=[Depends(_admin)])


def _items(request: Request) -> Items:
    return cast(Items, request.state.items)


def _pipeline(request: Request) -> Pipeline:
    return cast(Pipeline, request.state.pipeline)


def _json(body: object, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type=_JSON)


@router.put(
    "/v1/items/{item_id}",
    summary="Add or replace an item",
    responses={**answers(LiveItem, 400, 401, 403, 413, 415, 422, 503), 201: {"model": LiveItem}},
)
async def put_item(request: Request, item_id: ItemIdPath, body: ItemFields) -> Response:
    """The item, with the SID it got. It is on disk and in the next search when this answers; 201 if it is new."""
    (known,) = await _items(request).change([(item_id, body.to_item(item_id))])
    return Response(_pipeline(request).item(item_id), 200 if known else 201, media_type=_JSON)


@router.delete(
    "/v1/items/{item_id}", summary="Remove an item", responses=answers(Changed, 401, 403, 404, 422, 503)
)
async def delete_item(request: Request, item_id: ItemIdPath) -> Response:
    """The item is in no search any more when this answers."""
    (known,) = await _items(request).change([(item_id, None)])
    if not known:
        raise NotFound(f"item {item_id} is not in the catalog")
    return _json({"catalog_version": _pipeline(request).catalog_version()})


@router.post(
    "/v1/items:bulk",
    summary="Change many items",
    responses=answers(BulkAnswer, 400, 401, 403, 413, 415, 422, 503),
)
async def change_items(request: Request, body: BulkRequest) -> Response:
    """Puts and deletes that become visible together."""
    changes = [(item.item_id, item.to_item(item.item_id)) for item in body.put]
    known = await _items(request).change([*changes, *((item_id, None) for item_id in body.delete)])
    missing = [i for i, live in zip(body.delete, known[len(changes) :], strict=True) if not live]
    return _json(
        {
            "catalog_version": _pipeline(request).catalog_version(),
            "put": len(changes),
            "deleted": len(body.delete) - len(missing),
            "not_found": missing,
        }
    )


@router.post(
    "/v1/catalog/rollback", summary="Undo changes of items", responses=answers(Changed, 401, 403, 409, 503)
)
async def roll_back(request: Request) -> Response:
    """Every item is again what it was in the previous version: before the changes since the last compaction, or
    before that compaction if there were none. 409 when there is no earlier version."""
    await _items(request).roll_back()
    return _json({"catalog_version": _pipeline(request).catalog_version()})
