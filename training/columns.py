"""The column contract of the KuaiSearch tables (spec §2.1): names, types, defaults. Reading files is `tables`.

Columns without a default must be present and not null in every row; a missing or null optional value becomes its
default. Optional columns beyond KuaiSearch: items `price`, `image_url`, `attributes`, `in_stock`, `published_at`;
recall `carted_item_ids`, `source` (`log` or `bootstrap`); relevance `item_id`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, get_args

import orjson
import polars as pl

from onesearch.context import AgeBucket, Gender

GENDERS: tuple[str, ...] = get_args(Gender)
AGE_BUCKETS: tuple[str, ...] = get_args(AgeBucket)
UNKNOWN = "UNKNOWN"
REQUIRED = object()
_MAX_INT = 2**63 - 1


@dataclass(frozen=True)
class Kind:
    """One value type: what a reader is told, how the frame stores it, and a parser raising ValueError."""

    expected: str
    dtype: Any
    parse: Callable[[Any], Any]


@dataclass(frozen=True)
class Column:
    """One column; `default` is REQUIRED or the value of a missing or null cell."""

    name: str
    kind: Kind
    default: Any = REQUIRED


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_INT:
        raise ValueError
    return value


def _amount(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError
    return float(value)


def _string(value: Any) -> str:
    if type(value) is not str:
        raise ValueError
    return value


def _text(value: Any) -> str:
    if type(value) is not str or not value.strip():
        raise ValueError
    return value


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


def _ids(value: Any) -> list[int]:
    if type(value) is not list or not set(map(type, value)) <= {int}:
        raise ValueError
    if value and not 0 <= min(value) <= max(value) <= _MAX_INT:
        raise ValueError
    return value


def _attributes(value: Any) -> str:
    parsed = orjson.loads(value) if type(value) is str else value
    if type(parsed) is not dict or not set(map(type, parsed.values())) <= {str, int, float, bool}:
        raise ValueError
    return orjson.dumps(parsed).decode()


def _seconds(value: Any) -> int:
    """Epoch seconds, or an ISO 8601 date or time (without a zone: UTC)."""
    if type(value) is str:
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        return int((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp())
    if type(value) is not int or abs(value) > _MAX_INT:
        raise ValueError
    return value


def _choice(*options: Any) -> Kind:
    def parse(value: Any) -> Any:
        if type(value) is not type(options[0]) or value not in options:
            raise ValueError
        return value

    listed = ", ".join(map(str, options))
    return Kind(f"one of {listed}", pl.Int64 if type(options[0]) is int else pl.String, parse)


def _record(*fields: str) -> Kind:
    def parse(value: Any) -> dict[str, float]:
        if type(value) is not dict or not value.keys() <= set(fields):
            raise ValueError
        return {field: _amount(value.get(field, 0.0)) for field in fields}

    return Kind(
        f"an object of numbers >= 0 named {', '.join(fields)}",
        pl.Struct([pl.Field(field, pl.Float64) for field in fields]),
        parse,
    )


INTEGER = Kind("an integer >= 0", pl.Int64, _integer)
AMOUNT = Kind("a finite number >= 0", pl.Float64, _amount)
STRING = Kind("a string", pl.String, _string)
TEXT = Kind("a non-empty string", pl.String, _text)
BOOLEAN = Kind("true or false", pl.Boolean, _boolean)
IDS = Kind("a list of integers >= 0", pl.List(pl.Int64), _ids)
ATTRIBUTES = Kind(
    "an object of string, number or boolean values (or its JSON text)", pl.String, _attributes
)  # kept as JSON text: keys differ from item to item
SECONDS = Kind("epoch seconds (integer) or an ISO 8601 time", pl.Int64, _seconds)
SPLIT = _choice("train", "valid", "test")
FLAG = _choice(0, 1)
USER_STATISTICS = _record(
    "user_show_cnt_30d_hist", "user_click_cnt_30d_hist", "user_order_cnt_30d_hist", "user_gmv_30d_hist"
)
ITEM_STATISTICS = _record("item_show_cnt_30d_hist", "item_click_cnt_30d_hist", "item_order_cnt_30d_hist")


def _named(prefix: str) -> tuple[Column, Column]:
    """An id and name pair; 0 and UNKNOWN say that there is none."""
    return Column(f"{prefix}_id", INTEGER, 0), Column(f"{prefix}_name", STRING, UNKNOWN)


ITEMS = (
    Column("item_id", INTEGER),
    Column("item_title", TEXT),
    *_named("brand"),
    *_named("seller"),
    *_named("category_level1"),
    *_named("category_level2"),
    *_named("category_level3"),
    Column("price", AMOUNT, None),
    Column("image_url", STRING, ""),
    Column("attributes", ATTRIBUTES, "{}"),
    Column("in_stock", BOOLEAN, True),
    Column("published_at", SECONDS, None),
)
USERS = (
    Column("user_id", INTEGER),
    Column("gender", _choice(*GENDERS, UNKNOWN), UNKNOWN),
    Column("age_bucket", _choice(*AGE_BUCKETS, UNKNOWN), UNKNOWN),
    Column("fre_country", STRING, UNKNOWN),
    Column("fre_province", STRING, UNKNOWN),
    Column("fre_city", STRING, UNKNOWN),
)
RECALL = (
    Column("user_id", INTEGER),
    Column("session_id", INTEGER),
    Column("query", TEXT),
    Column("time_index", INTEGER),
    Column("impressed_item_ids", IDS),
    Column("clicked_item_ids", IDS),
    Column("carted_item_ids", IDS, []),
    Column("purchased_item_ids", IDS, []),
    Column("split", SPLIT, "train"),
    Column("source", _choice("log", "bootstrap"), "log"),
)
RANK = (
    Column("user_id", INTEGER),
    Column("session_id", INTEGER),
    Column("query", TEXT),
    Column("time_index", INTEGER),
    Column("user_fan_number", INTEGER, 0),
    Column("user_follow_number", INTEGER, 0),
    Column("search_entrance", STRING, UNKNOWN),
    Column("recently_clicked_item_ids", IDS, []),
    Column("recently_purchased_item_ids", IDS, []),
    Column("target_item_id", INTEGER),
    Column("target_item_price", AMOUNT, None),
    Column("is_clicked", FLAG),
    Column("is_purchased", FLAG, 0),
    Column("user_statistical_features", USER_STATISTICS, USER_STATISTICS.parse({})),
    Column("target_item_statistical_features", ITEM_STATISTICS, ITEM_STATISTICS.parse({})),
    Column("split", SPLIT, "train"),
)
RELEVANCE = (
    Column("query", TEXT),
    Column("item_id", INTEGER, None),
    Column("item_title", TEXT),
    Column("brand", STRING, ""),
    Column("seller_name", STRING, ""),
    Column("attr_value", STRING, ""),
    Column("score", _choice(0, 1, 2, 3)),
)
SCHEMAS: dict[str, tuple[Column, ...]] = {
    "items": ITEMS,
    "users": USERS,
    "recall": RECALL,
    "rank": RANK,
    "relevance": RELEVANCE,
}
KEYS = {"items": "item_id", "users": "user_id", "recall": "session_id"}


def frame_schema(table: str) -> dict[str, Any]:
    """Column name → polars dtype of one table, in contract order."""
    return {column.name: column.kind.dtype for column in SCHEMAS[table]}
