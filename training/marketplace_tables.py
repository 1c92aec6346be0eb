"""The simulated marketplace written down as KuaiSearch tables, plus its truth (needs behind queries)."""

from collections import defaultdict

import numpy as np
import orjson
import polars as pl

from training.columns import AGE_BUCKETS
from training.marketplace_log import Log
from training.marketplace_needs import Constraint, Need, grade
from training.marketplace_world import DAY, DAYS, START, Floats, Ints, World
from training.tables import Row, Tables, frame

RANK_SESSIONS = 1_000  # one row per impression of the last sessions: enough for a reward model, small on disk
RELEVANCE_PAIRS = 20_000
RECENT = 20
WINDOW = 30 * DAY
SPAN = DAYS * DAY


def build_tables(world: World, needs: list[Need], log: Log, rng: np.random.Generator) -> Tables:
    """All five tables. Item and user ids are position + 1; 0 is nobody."""
    values = [_values(world, i) for i in range(len(world.items.type))]
    titles = [_title(world, i, value, rng) for i, value in enumerate(values)]
    return Tables(
        items=frame("items", _items(world, titles, values, rng)),
        users=frame("users", _users(world)),
        recall=frame("recall", _recall(needs, log)),
        rank=frame("rank", _columns(_rank(world, needs, log, rng))),
        relevance=frame(
            "relevance", _columns(_relevance(world, needs, log, _described(world, titles, values), rng))
        ),
    )


def truth_frames(world: World, needs: list[Need]) -> dict[str, pl.DataFrame]:
    """`needs` (need_id, kind, wants and negated as JSON, item_ids eligible) and `queries` (query → need_id)."""
    rows = [
        {
            "need_id": index,
            "kind": need.kind,
            "wants": orjson.dumps(
                [
                    {"type": world.words.types[w.type].name, "constraints": _spell(world, w.constraints)}
                    for w in need.wants
                ]
            ).decode(),
            "negated": orjson.dumps(_spell(world, need.negated)).decode(),
            "item_ids": (need.eligible + 1).tolist(),
        }
        for index, need in enumerate(needs)
    ]
    queries = [(text, index) for index, need in enumerate(needs) for text in need.texts]
    return {
        "needs": pl.DataFrame(rows),
        "queries": pl.DataFrame(queries, schema={"query": pl.String, "need_id": pl.Int64}, orient="row"),
    }


def _spell(world: World, constraints: tuple[Constraint, ...]) -> list[dict[str, str]]:
    names = {**world.names, "brand": world.brands.names, "tier": ("budget", "ordinary", "premium")}
    return [{"axis": axis, "value": names[axis][value]} for axis, value in constraints]


def _values(world: World, item: int) -> dict[str, str]:
    """Attribute words of one item by axis, empty where it has none; both features joined under `feature`."""
    words = {}
    for axis, codes in world.items.values.items():
        found = [world.names[axis][c] for c in np.ravel(codes[item]) if c >= 0]
        words[axis] = ", ".join(found)
    return words


def _title(world: World, item: int, value: dict[str, str], rng: np.random.Generator) -> str:
    """A seller's title: brand and type always, most attributes, sometimes a marketing word."""
    words = world.words
    brand, size = world.brands.names[world.items.brand[item]], world.items.size[item]
    kind = words.types[world.items.type[item]].name
    series = words.lists["series"][int(rng.integers(len(words.lists["series"])))] if rng.random() < 0.5 else ""
    first, second = value["feature"].split(", ")
    audience = f"for {value['audience']}" if value["audience"] else ""
    season = f"for {value['season']}" if value["season"] else ""
    material = "" if set(value["material"].split()) & set(kind.split()) else value["material"]
    head = (
        f"{brand} {series} {material} {kind} {size} {value['colour']}",
        f"{brand} {series} {value['style']} {kind} {audience} in {value['colour']}, {value['material']}",
        f"{brand} {series} {first} {kind} {audience}, {value['material']}, {value['colour']}, {size}",
    )[form := int(rng.integers(3))]
    tail = ((audience, first, second, season), (first, second, season), (second, value["style"], season))[form]
    extra = (
        words.lists["marketing"][int(rng.integers(len(words.lists["marketing"])))] if rng.random() < 0.25 else ""
    )
    text = ", ".join(part for part in (head, *tail, extra) if part)
    return " ".join(text.replace(" ,", ",").split())


def _items(
    world: World, titles: list[str], values: list[dict[str, str]], rng: np.random.Generator
) -> dict[str, object]:
    items, words, brand = world.items, world.words, world.items.brand
    types = [words.types[t] for t in items.type]
    outlet = rng.random(len(titles)) < 0.3
    cities = [city for _, city in words.cities]
    attributes = [
        {**{axis: text for axis, text in value.items() if text}, "size": size}
        for value, size in zip(values, items.size, strict=True)
    ]
    return {
        "item_id": np.arange(1, len(titles) + 1),
        "item_title": titles,
        "brand_id": brand + 1,
        "brand_name": [world.brands.names[b] for b in brand],
        "seller_id": brand * 2 + outlet + 1,
        "seller_name": [
            f"{cities[b % len(cities)]} {words.departments[world.brands.department[b]]} Outlet {b + 1}"
            if is_outlet
            else f"{world.brands.names[b]} Official Store"
            for b, is_outlet in zip(brand, outlet, strict=True)
        ],
        "category_level1_id": world.type_department[items.type] + 1,
        "category_level1_name": [words.departments[t.department] for t in types],
        "category_level2_id": world.type_category[items.type] + 1,
        "category_level2_name": [words.categories[t.category] for t in types],
        "category_level3_id": items.type + 1,
        "category_level3_name": [t.name for t in types],
        "price": items.price.round(2),
        "attributes": [orjson.dumps(a).decode() for a in attributes],
        "in_stock": rng.random(len(titles)) < 0.96,
        "published_at": items.published_at,
    }


def _users(world: World) -> dict[str, object]:
    users, cities = world.users, world.words.cities
    return {
        "user_id": np.arange(1, len(users.age) + 1),
        "gender": ["FM"[g] for g in users.gender],
        "age_bucket": [AGE_BUCKETS[a] for a in users.age],
        "fre_country": [cities[c][0] for c in users.city],
        "fre_city": [cities[c][1] for c in users.city],
    }


def _query(needs: list[Need], log: Log, session: int) -> str:
    return needs[int(log.need[session])].texts[int(log.text[session])]


def _columns(rows: list[Row]) -> dict[str, list[object]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _lists(padded: Ints) -> list[list[int]]:
    return [(row[row >= 0] + 1).tolist() for row in padded]


def _recall(needs: list[Need], log: Log) -> dict[str, object]:
    count = len(log.user)
    return {
        "user_id": log.user + 1,
        "session_id": np.arange(1, count + 1),
        "query": [_query(needs, log, s) for s in range(count)],
        "time_index": log.time,
        "impressed_item_ids": _lists(log.shown),
        "clicked_item_ids": _lists(log.clicked),
        "carted_item_ids": _lists(np.where(log.carted, log.clicked, -1)),
        "purchased_item_ids": _lists(np.where(log.bought, log.clicked, -1)),
        "split": log.split,
    }


class _Counter:
    """Events (who, when, how much) summed over the 30 days strictly before a moment."""

    def __init__(self, who: Ints, when: Ints, amount: Floats | None = None) -> None:
        keys = who * SPAN + (when - START)
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._sums = np.concatenate([[0.0], np.cumsum(np.ones(len(keys)) if amount is None else amount[order])])

    def before(self, who: int, when: int) -> float:
        start = who * SPAN
        bounds = (start + max(0, when - START - WINDOW), start + when - START)
        low, high = np.searchsorted(self._keys, bounds)
        return round(float(self._sums[high] - self._sums[low]), 2)


def _counters(world: World, log: Log) -> tuple[dict[str, _Counter], dict[str, _Counter]]:
    """The 30-day counters of the rank table: per user and per item."""
    by_user, by_item = {}, {}
    bought = np.where(log.bought, log.clicked, -1)
    for name, padded in (("show", log.shown), ("click", log.clicked), ("order", bought)):
        row, place = np.nonzero(padded >= 0)
        by_user[f"user_{name}_cnt_30d_hist"] = _Counter(log.user[row], log.time[row])
        by_item[f"item_{name}_cnt_30d_hist"] = _Counter(padded[row, place], log.time[row])
    row, place = np.nonzero(log.bought)
    spent = world.items.price[log.clicked[row, place]]
    by_user["user_gmv_30d_hist"] = _Counter(log.user[row], log.time[row], spent)
    return by_user, by_item


def _rank(world: World, needs: list[Need], log: Log, rng: np.random.Generator) -> list[Row]:
    """One row per impression of the last sessions; histories and counters end strictly before the session."""
    by_user, by_item = _counters(world, log)
    fans, follows = rng.integers(0, 400, len(world.users.age)), rng.integers(0, 150, len(world.users.age))
    entrances = rng.choice(["homepage", "mall", "product page"], len(log.user), p=[0.6, 0.3, 0.1])
    clicks: dict[int, list[int]] = defaultdict(list)
    orders: dict[int, list[int]] = defaultdict(list)
    rows: list[Row] = []
    for s in range(len(log.user)):
        user, time = int(log.user[s]), int(log.time[s])
        clicked = log.clicked[s][log.clicked[s] >= 0]
        bought = log.clicked[s][log.bought[s]]
        if s >= len(log.user) - RANK_SESSIONS:
            session = {
                "user_id": user + 1,
                "session_id": s + 1,
                "query": _query(needs, log, s),
                "time_index": time,
                "user_fan_number": int(fans[user]),
                "user_follow_number": int(follows[user]),
                "search_entrance": str(entrances[s]),
                "recently_clicked_item_ids": clicks[user][-RECENT:],
                "recently_purchased_item_ids": orders[user][-RECENT:],
                "user_statistical_features": {name: c.before(user, time) for name, c in by_user.items()},
                "split": str(log.split[s]),
            }
            for item in log.shown[s][log.shown[s] >= 0].tolist():
                target = {
                    "target_item_id": item + 1,
                    "target_item_price": round(float(world.items.price[item]), 2),
                    "is_clicked": int(item in clicked),
                    "is_purchased": int(item in bought),
                    "target_item_statistical_features": {
                        name: c.before(item, time) for name, c in by_item.items()
                    },
                }
                rows.append(session | target)
        clicks[user] += (clicked + 1).tolist()
        orders[user] += (bought + 1).tolist()
    return rows


def _described(world: World, titles: list[str], values: list[dict[str, str]]) -> list[Row]:
    """The item side of a relevance row, per item."""
    return [
        {
            "item_id": item + 1,
            "item_title": title,
            "brand": (brand := world.brands.names[world.items.brand[item]]),
            "seller_name": f"{brand} Official Store",
            "attr_value": ",".join(text for text in value.values() if text),
        }
        for item, (title, value) in enumerate(zip(titles, values, strict=True))
    ]


def _relevance(
    world: World, needs: list[Need], log: Log, described: list[Row], rng: np.random.Generator
) -> list[Row]:
    """Graded query–item pairs: for logged queries some eligible items, others of the types, others of anywhere."""
    logged = np.unique(np.stack([log.need, log.text], axis=1), axis=0)
    by_type = [np.flatnonzero(world.items.type == t) for t in range(len(world.words.types))]
    rows: list[Row] = []
    for index, text in rng.permutation(logged)[: RELEVANCE_PAIRS // 8].tolist():
        need = needs[index]
        near = np.concatenate([by_type[want.type] for want in need.wants])
        department = world.type_department[need.wants[0].type]
        siblings = by_type[int(rng.choice(np.flatnonzero(world.type_department == department)))]
        drawn = [rng.choice(pool, n) for pool, n in ((need.eligible, 3), (near, 2), (siblings, 1)) if len(pool)]
        items = np.unique(np.concatenate([*drawn, rng.integers(len(described), size=2)]))
        grades = grade(world, need, items).tolist()
        rows += [
            {"query": need.texts[text], **described[item], "score": score}
            for item, score in zip(items.tolist(), grades, strict=True)
        ]
    return rows
