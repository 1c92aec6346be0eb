"""The vocabulary of the simulated marketplace, read from `marketplace.toml`."""

import tomllib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

WORDS = Path(__file__).with_name("marketplace.toml")


@dataclass(frozen=True)
class ProductType:
    """A leaf of the taxonomy (category level 3) with the words its products can carry; price in currency units."""

    name: str
    price: float
    department: int
    category: int
    materials: tuple[str, ...]
    features: tuple[str, ...]
    sizes: tuple[str, ...]
    audiences: tuple[str, ...]

    @property
    def plural(self) -> str:
        if self.name.endswith("s"):
            return self.name
        if self.name.endswith(("fe", "lf")):
            return f"{self.name.removesuffix('e').removesuffix('f')}ves"
        if self.name.endswith(("ch", "sh", "x")):
            return f"{self.name}es"
        return (
            f"{self.name[:-1]}ies" if self.name.endswith("y") and self.name[-2] not in "aeio" else f"{self.name}s"
        )


@dataclass(frozen=True)
class Scene:
    """A situation said in words, and the (product type, constraint values) it makes people want."""

    phrases: tuple[str, ...]
    wants: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Words:
    """Everything the marketplace can say; `departments` and `categories` are names, indexed by product types."""

    departments: tuple[str, ...]
    categories: tuple[str, ...]
    types: tuple[ProductType, ...]
    scenes: tuple[Scene, ...]
    cities: tuple[tuple[str, str], ...]
    lists: dict[str, tuple[str, ...]]

    @cached_property
    def type_index(self) -> dict[str, int]:
        return {t.name: i for i, t in enumerate(self.types)}


def load_words() -> Words:
    """The vocabulary as shipped."""
    raw = tomllib.loads(WORDS.read_text(encoding="utf-8"))
    departments = tuple(raw["taxonomy"])
    categories: list[str] = []
    types: list[ProductType] = []
    lists = {name: _split(value) for name, value in raw.items() if isinstance(value, str)}
    for department, shelves in enumerate(raw["taxonomy"].values()):
        for name, shelf in shelves.items():
            types += _types(shelf, department, len(categories), lists)
            categories.append(name)
    scenes = tuple(
        Scene(tuple(p.strip() for p in said.split("|")), tuple(_want(want) for want in wants))
        for said, wants in raw["scenes"].items()
    )
    cities = tuple((country, city) for country, names in raw["cities"].items() for city in _split(names))
    return Words(departments, tuple(categories), tuple(types), scenes, cities, lists)


def shrink(words: Words, items: int, rng: np.random.Generator) -> Words:
    """Keep as many scenes and product types as `items` can fill (about 60 items a type), so that a small marketplace
    is a part of the large one and not a thin copy of it. From 20,000 items on everything is kept."""
    scenes = rng.permutation(len(words.scenes))[: max(6, items // 290)]
    kept = tuple(words.scenes[i] for i in sorted(scenes))
    wanted = {name for scene in kept for name, _ in scene.wants}
    others = [kind.name for kind in words.types if kind.name not in wanted]
    room = max(0, items // 60 - len(wanted))
    wanted |= {others[i] for i in rng.permutation(len(others))[:room]}
    return replace(words, scenes=kept, types=tuple(kind for kind in words.types if kind.name in wanted))


def _types(
    shelf: dict[str, Any], department: int, category: int, lists: dict[str, tuple[str, ...]]
) -> list[ProductType]:
    materials, features, sizes, audiences = (
        _split(shelf.get(name, "")) for name in ("materials", "features", "sizes", "audiences")
    )
    types = []
    for name, price in (entry.rsplit(" ", 1) for entry in _split(shelf["types"])):
        only = ("women",) if name in lists["for_women"] else ("men",) if name in lists["for_men"] else audiences
        types.append(ProductType(name, float(price), department, category, materials, features, sizes, only))
    return types


def _want(text: str) -> tuple[str, tuple[str, ...]]:
    name, _, values = text.partition(": ")
    return name, tuple(v.strip() for v in values.split("+") if v.strip())


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
