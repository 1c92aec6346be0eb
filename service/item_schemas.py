"""Bodies of the items API: what an item may hold, and what changes are answered with."""

from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, Field, StringConstraints, model_validator

from onesearch.catalog import CATEGORY_LEVELS, Item
from service.schemas import Body, CatalogItem, ItemId, Moment, Name, StrictPrice, plain, readable

MAX_BULK = 1000
_MAX_EXACT = 2**53  # integers beyond are not the same in every JSON reader

Title = Annotated[str, StringConstraints(strict=True, max_length=512), AfterValidator(readable)]
Text = Annotated[str, StringConstraints(strict=True, max_length=4096), AfterValidator(plain)]
Url = Annotated[str, StringConstraints(strict=True, max_length=2048), AfterValidator(plain)]
Whole = Annotated[int, Field(strict=True, ge=-_MAX_EXACT, le=_MAX_EXACT)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Scalar = Annotated[bool, Field(strict=True)] | Whole | Number | Text


class ItemFields(Body):
    """Body of `PUT /v1/items/{item_id}`: the whole item; what is left out is empty."""

    title: Title
    brand: Name | None = None
    category: list[Name] = Field(default=[], max_length=CATEGORY_LEVELS, description="from coarse to fine")
    price: StrictPrice | None = None
    image_url: Url | None = None
    in_stock: Annotated[bool, Field(strict=True)] = True
    attributes: dict[Name, Scalar | list[Scalar]] = Field(default={}, max_length=64)
    published_at: Moment | None = Field(default=None, description="Unix seconds, or an ISO 8601 date or time")

    def to_item(self, item_id: int) -> Item:
        """The catalog's item."""
        return Item(
            item_id=item_id,
            title=self.title,
            brand=self.brand or "",
            category=tuple(self.category),
            price=self.price,
            image_url=self.image_url,
            in_stock=self.in_stock,
            attributes=tuple(self.attributes.items()),
            published_at=self.published_at or 0,
        )


class BulkItem(ItemFields):
    """An item with its id."""

    item_id: ItemId


class BulkRequest(Body):
    """Body of `POST /v1/items:bulk`: items to put and ids to delete, at most 1,000 together, all or none."""

    put: list[BulkItem] = Field(default=[], max_length=MAX_BULK)
    delete: list[ItemId] = Field(default=[], max_length=MAX_BULK)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        ids = [*(item.item_id for item in self.put), *self.delete]
        if not 1 <= len(ids) <= MAX_BULK:
            raise ValueError(f"has {len(ids)} changes, expected 1 to {MAX_BULK}")
        if twice := {i for i in ids if ids.count(i) > 1} if len(set(ids)) < len(ids) else ():
            raise ValueError(f"item {min(twice)} is named more than once")
        return self


class LiveItem(CatalogItem):
    """One item as it is served, and the version of the catalog that has it so."""

    published_at: int | None
    catalog_version: str


class Changed(BaseModel):
    """Answer of a change: the version of the catalog from which on it is visible."""

    catalog_version: str


class BulkAnswer(Changed):
    """Answer of `POST /v1/items:bulk`. not_found: ids to delete that were not there."""

    put: int
    deleted: int
    not_found: list[int]
