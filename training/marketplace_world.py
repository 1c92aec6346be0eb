"""The simulated marketplace at rest: brands, items, users and what each user likes (spec §9.3).

I items, U users, B brands, T product types. Arrays are aligned with item or user position; ids are position + 1.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from training.columns import AGE_BUCKETS
from training.marketplace_words import Words

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

DAY = 86_400
START = 1_756_684_800  # 2025-09-01T00:00:00Z, the first session
DAYS = 100
TEST_SHARE, VALID_SHARE = 0.07, 0.03
COLD_SHARE = 0.06  # published when the test split begins, so never shown before it
TIERS = 3  # budget, ordinary, premium
BRANDS_PER_DEPARTMENT = 12
STYLES_PER_DEPARTMENT = 5
AXES = ("colour", "material", "style", "audience", "season", "feature")


@dataclass(frozen=True)
class Brands:
    """B brands, each at home in one department with one price tier and one signature style."""

    names: tuple[str, ...]
    department: Ints
    tier: Ints
    style: Ints


@dataclass(frozen=True)
class Items:
    """I items. `values[axis]` holds codes into `World.names[axis]`, -1 for none: [I], for `feature` [I, 2]."""

    type: Ints
    brand: Ints
    values: dict[str, Ints]
    price: Floats
    size: tuple[str, ...]
    log_popularity: Floats
    published_at: Ints


@dataclass(frozen=True)
class Users:
    """U users; tastes are utilities added to an item that has the property."""

    gender: Ints
    age: Ints
    city: Ints
    tier: Ints
    activity: Floats
    colour: Floats
    style: Floats
    brand: Floats
    type: Floats


@dataclass(frozen=True)
class World:
    """The marketplace; `names[axis]` spells the codes of an attribute axis."""

    words: Words
    names: dict[str, tuple[str, ...]]
    brands: Brands
    items: Items
    users: Users

    @cached_property
    def type_department(self) -> Ints:
        return np.array([t.department for t in self.words.types])

    @cached_property
    def type_category(self) -> Ints:
        return np.array([t.category for t in self.words.types])

    @cached_property
    def item_tier(self) -> Ints:
        return self.brands.tier[self.items.brand]

    def holds(self, axis: str, value: int) -> Bools:
        """[I] whether each item has a value; axes are AXES and also `brand` and `tier`."""
        codes = {"brand": self.items.brand, "tier": self.item_tier, **self.items.values}[axis]
        same: Bools = codes == value
        return same if same.ndim == 1 else np.any(same, axis=1)

    def utility(self, users: Ints, items: Ints) -> Floats:
        """[S, C] what each of S users makes of items [C] or [S, C]: popularity, tastes and affinities."""
        u, i, who = self.users, self.items, users[:, None]
        audience = i.values["audience"][items]
        wrong = (audience >= 0) & (audience != u.gender[who])
        total: Floats = (
            i.log_popularity[items]
            + u.colour[who, i.values["colour"][items]]
            + u.style[who, i.values["style"][items]]
            + u.brand[who, i.brand[items]]
            + u.type[who, i.type[items]]
            - 0.8 * np.abs(u.tier[who] - self.item_tier[items])
            - 1.2 * wrong
        )
        return total


def build_world(words: Words, items: int, users: int, rng: np.random.Generator) -> World:
    """Draw a marketplace of the given size."""
    brands = _brands(words, rng)
    names = {
        "colour": words.lists["colours"],
        "style": words.lists["styles"],
        "season": words.lists["seasons"],
        "audience": ("women", "men", "kids"),
        "material": tuple(sorted({m for t in words.types for m in t.materials})),
        "feature": tuple(sorted({f for t in words.types for f in t.features})),
    }
    return World(words, names, brands, _items(words, names, brands, items, rng), _users(words, brands, users, rng))


def zipf(size: int, exponent: float) -> Floats:
    """[size] probabilities falling with rank^-exponent."""
    weights = np.arange(1, size + 1) ** -exponent
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def _brands(words: Words, rng: np.random.Generator) -> Brands:
    departments = len(words.departments)
    count = departments * BRANDS_PER_DEPARTMENT
    pool = [start + end for start in words.lists["brand_starts"] for end in words.lists["brand_ends"]]
    department = np.repeat(np.arange(departments), BRANDS_PER_DEPARTMENT)
    return Brands(
        names=tuple(pool[i] for i in rng.choice(len(pool), count, replace=False)),
        department=department,
        tier=np.tile(np.arange(BRANDS_PER_DEPARTMENT) % TIERS, departments),
        style=(department + rng.integers(STYLES_PER_DEPARTMENT, size=count)) % len(words.lists["styles"]),
    )


def _items(
    words: Words, names: dict[str, tuple[str, ...]], brands: Brands, count: int, rng: np.random.Generator
) -> Items:
    weights = rng.lognormal(0.0, 0.5, len(words.types))
    kind = rng.choice(len(words.types), count, p=weights / weights.sum())
    department = np.array([t.department for t in words.types])[kind]
    brand = department * BRANDS_PER_DEPARTMENT + rng.choice(
        BRANDS_PER_DEPARTMENT, count, p=zipf(BRANDS_PER_DEPARTMENT, 0.5)
    )
    own_style = rng.random(count) < 0.5
    style = np.where(own_style, brands.style[brand], department + rng.integers(STYLES_PER_DEPARTMENT, size=count))
    season = np.where(rng.random(count) < 0.7, -1, rng.integers(len(names["season"]), size=count))
    size = rng.random(count)
    values = {
        "colour": _colours(words, kind, rng),
        "style": style % len(names["style"]),
        "season": season,
        "audience": _pick(words, "audiences", names["audience"], kind, rng),
        "material": _pick(words, "materials", names["material"], kind, rng),
        "feature": _features(words, names["feature"], kind, rng),
    }
    base = np.array([t.price for t in words.types])[kind] * np.array([0.6, 1.0, 1.9])[brands.tier[brand]]
    raw = base * rng.lognormal(0.0, 0.18, count) * (0.8 + 0.4 * size)
    return Items(
        type=kind,
        brand=brand,
        values=values,
        price=np.maximum(np.round(raw), 2) - rng.choice([0.01, 0.05, 0.5, 1.0], count),
        size=tuple(_at(words.types[t].sizes, s) for t, s in zip(kind, size, strict=True)),
        log_popularity=rng.normal(0.0, 1.0, count),
        published_at=_published(count, rng),
    )


def _at(options: tuple[str, ...], share: float) -> str:
    return options[int(share * len(options))]


def _pick(words: Words, field: str, names: tuple[str, ...], kind: Ints, rng: np.random.Generator) -> Ints:
    """[I] one value of the product type's own list, -1 where the list is empty."""
    code = {name: i for i, name in enumerate(names)}
    own = [np.array([code[v] for v in getattr(t, field)] or [-1]) for t in words.types]
    draw = rng.random(len(kind))
    return np.array([own[t][int(d * len(own[t]))] for t, d in zip(kind, draw, strict=True)])


def _colours(words: Words, kind: Ints, rng: np.random.Generator) -> Ints:
    """[I] any colour but the last, which is that of the categories that have no colour to choose."""
    last = len(words.lists["colours"]) - 1
    fixed = np.array([words.categories[t.category] in words.lists["uncoloured"] for t in words.types])
    return np.where(fixed[kind], last, rng.choice(last, len(kind), p=zipf(last, 0.6)))


def _features(words: Words, names: tuple[str, ...], kind: Ints, rng: np.random.Generator) -> Ints:
    """[I, 2] two different features of the product type's own list."""
    code = {name: i for i, name in enumerate(names)}
    own = np.array([[code[f] for f in t.features] for t in words.types])
    first = rng.integers(own.shape[1], size=len(kind))
    second = (first + rng.integers(1, own.shape[1], size=len(kind))) % own.shape[1]
    return np.stack([own[kind, first], own[kind, second]], axis=1)


def _published(count: int, rng: np.random.Generator) -> Ints:
    """Most items are older than the log, some arrive during it, the cold ones with the test split."""
    test_start = START + int(DAYS * DAY * (1 - TEST_SHARE))
    old = START - rng.integers(DAY, 700 * DAY, size=count)
    during = rng.integers(START, test_start - 20 * DAY, size=count)
    cold = test_start + rng.integers(DAY // 4, 2 * DAY, size=count)
    draw = rng.random(count)
    return np.where(draw < COLD_SHARE, cold, np.where(draw < COLD_SHARE + 0.1, during, old))


def _users(words: Words, brands: Brands, count: int, rng: np.random.Generator) -> Users:
    gender = rng.integers(2, size=count)
    age = rng.choice(len(AGE_BUCKETS), count, p=[0.01, 0.06, 0.18, 0.24, 0.25, 0.15, 0.11])
    types = words.types
    by_age = rng.normal(0.0, 0.4, (len(AGE_BUCKETS), len(types)))
    by_department = rng.normal(0.0, 0.5, (count, len(words.departments)))
    department = np.array([t.department for t in types])
    return Users(
        gender=gender,
        age=age,
        city=rng.integers(len(words.cities), size=count),
        tier=rng.choice(TIERS, count, p=[0.35, 0.4, 0.25]),
        activity=rng.permutation(zipf(count, 0.7)),
        colour=_favourites(count, len(words.lists["colours"]), 3, 1.5, rng),
        style=_favourites(count, len(words.lists["styles"]), 3, 1.5, rng),
        brand=_favourites(count, len(brands.names), 24, 1.2, rng),
        type=by_age[age] + by_department[:, department] + rng.normal(0.0, 0.5, (count, len(types))),
    )


def _favourites(users: int, options: int, liked: int, gain: float, rng: np.random.Generator) -> Floats:
    """[users, options] `gain` for `liked` random options of each user, else 0."""
    return np.where(rng.random((users, options)).argsort(axis=1) < liked, gain, 0.0)
