"""What people search for in the simulated marketplace: needs, the words they use, and which items would do.

A need is a small set of wants (product type and attribute constraints) minus negated attributes, said in several
surface forms. Kinds and shares follow spec §9.3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from training.marketplace_words import Words
from training.marketplace_world import AXES, Bools, Floats, Ints, World, zipf

SHARES = {"scene": 0.40, "question": 0.10, "negation": 0.10, "dupe": 0.08, "category": 0.16, "attribute": 0.16}
MIN_ELIGIBLE = 10
POOLS = {"negation": 400, "dupe": 500, "attribute": 2500}  # drafts per POOL_ITEMS items
POOL_ITEMS = 20_000
SKEW = {"scene": 0.8, "question": 0.6, "negation": 0.6, "dupe": 0.6, "category": 0.8, "attribute": 0.7}
TYPO_SHARE = 0.04
ATTRIBUTE_AXES = ("feature", "material", "style", "colour", "audience", "season")
ATTRIBUTE_SHARES = (0.38, 0.26, 0.12, 0.10, 0.09, 0.05)
QUESTIONS = ("what do i need for {}", "{}, what should i buy?", "{}: any recommendations?", "what helps with {}")
NEGATIONS = ("{} without {}", "{} but not {}", "{} no {}", "{} anything but {}")
DUPES = ("{} {} dupe", "dupe for {} {}", "cheaper alternative to {} {}", "looks like {} {} but cheaper")

Constraint = tuple[str, int]


@dataclass(frozen=True)
class Want:
    """One product type with the attribute values it must have."""

    type: int
    constraints: tuple[Constraint, ...] = ()


@dataclass(frozen=True)
class Need:
    """What one group of equivalent queries is after. `weights` are the shares of its surface forms `texts`."""

    kind: str
    texts: tuple[str, ...]
    weights: Floats
    wants: tuple[Want, ...]
    negated: tuple[Constraint, ...]
    eligible: Ints


@dataclass(frozen=True)
class _Draft:
    kind: str
    texts: tuple[str, ...]
    wants: tuple[Want, ...]
    negated: tuple[Constraint, ...] = ()


def build_needs(world: World, rng: np.random.Generator) -> tuple[list[Need], Floats]:
    """All needs that MIN_ELIGIBLE items can meet, and the probability of each in the log. Texts are distinct."""
    needs: list[Need] = []
    weights: list[float] = []
    said: set[str] = set()
    for kind, drafts in _drafts(world, rng).items():
        pool: list[Need] = []
        for draft in drafts:
            texts = tuple(text for text in dict.fromkeys(draft.texts) if text not in said)
            found = eligible(world, draft.wants, draft.negated)
            if texts and len(found) >= MIN_ELIGIBLE:
                need = _finish(draft, texts, found, said, rng)
                pool.append(need)
                said.update(need.texts)
        needs += pool
        weights += list(SHARES[kind] * zipf(len(pool), SKEW[kind]))
    total = np.array(weights)
    return needs, total / total.sum()


def eligible(world: World, wants: tuple[Want, ...], negated: tuple[Constraint, ...]) -> Ints:
    """Positions of the items that meet any want and show no negated value, ascending."""
    meets: Bools = np.zeros(len(world.items.type), dtype=bool)
    for want in wants:
        meets |= _meets(world, want)
    return np.flatnonzero(meets & ~_shows(world, negated))


def grade(world: World, need: Need, items: Ints) -> Ints:
    """Four-tier relevance [C] of items to a need: 3 all constraints hold, 2 only the product type, 1 only the
    department, 0 neither or a negated attribute is shown (spec §9.3)."""
    kind = world.items.type[items]
    types = np.array([want.type for want in need.wants])
    score = np.isin(world.type_department[kind], world.type_department[types]).astype(np.int64)
    score[np.isin(kind, types)] = 2
    score[np.isin(items, need.eligible)] = 3
    score[_shows(world, need.negated)[items]] = 0
    return score


def _meets(world: World, want: Want) -> Bools:
    meets: Bools = world.items.type == want.type
    for axis, value in want.constraints:
        meets = meets & world.holds(axis, value)
    return meets


def _shows(world: World, negated: tuple[Constraint, ...]) -> Bools:
    shows: Bools = np.zeros(len(world.items.type), dtype=bool)
    for axis, value in negated:
        shows |= world.holds(axis, value)
    return shows


def _finish(draft: _Draft, texts: tuple[str, ...], found: Ints, said: set[str], rng: np.random.Generator) -> Need:
    """Add rare misspellings of the first two forms; the first form is the usual one."""
    typos = {_misspell(text, rng) for text in texts[:2] for _ in range(2)} - said - set(texts)
    shares = zipf(len(texts), 1.2) * (1 - TYPO_SHARE * len(typos))
    weights = np.concatenate([shares, np.full(len(typos), TYPO_SHARE)])
    return Need(draft.kind, (*texts, *sorted(typos)), weights, draft.wants, draft.negated, found)


def _misspell(text: str, rng: np.random.Generator) -> str:
    """One letter dropped, doubled or swapped with the next, inside a word; short texts stay as they are."""
    if len(text) < 5:
        return text
    at = int(rng.integers(1, len(text) - 2))
    if not text[at : at + 2].isalpha():
        return text.replace(" ", "", 1)
    edits = (
        text[:at] + text[at + 1 :],
        text[:at] + text[at] + text[at:],
        text[:at] + text[at + 1] + text[at] + text[at + 2 :],
    )
    return edits[int(rng.integers(len(edits)))]


def _drafts(world: World, rng: np.random.Generator) -> dict[str, list[_Draft]]:
    scenes = [(scene.phrases, _scene_wants(world, scene.wants)) for scene in world.words.scenes]
    order = rng.permutation(len(scenes))
    scenes = [scenes[i] for i in order]
    categories = [*_plain(world.words), *_broad(world.words)]
    return {
        "scene": [_Draft("scene", phrases, wants) for phrases, wants in scenes],
        "question": [
            _Draft("question", tuple(q.format(p) for p in phrases for q in QUESTIONS), wants)
            for phrases, wants in scenes
        ],
        "negation": list(_negations(world, scenes, rng)),
        "dupe": list(_dupes(world, rng)),
        "category": [categories[i] for i in rng.permutation(len(categories))],
        "attribute": list(_attributes(world, rng)),
    }


def _scene_wants(world: World, wants: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[Want, ...]:
    return tuple(
        Want(world.words.type_index[name], tuple(_constraint(world, value) for value in values))
        for name, values in wants
    )


def _constraint(world: World, value: str) -> Constraint:
    """The axis and code of a value word; a word of several axes means the first of AXES."""
    axis = next(axis for axis in AXES if value in world.names[axis])
    return axis, world.names[axis].index(value)


def _plain(words: Words) -> Iterator[_Draft]:
    for code, kind in enumerate(words.types):
        texts = (kind.name, kind.plural, f"best {kind.name}", f"{kind.plural} on sale")
        yield _Draft("category", texts, (Want(code),))


def _broad(words: Words) -> Iterator[_Draft]:
    """Ambiguous head queries: a category's name, or a noun that several product types end in (`bag`, `set`)."""
    for category, name in enumerate(words.categories):
        wants = tuple(Want(code) for code, kind in enumerate(words.types) if kind.category == category)
        yield _Draft("category", (name.lower(),), wants)
    nouns: dict[str, list[int]] = {}
    for code, kind in enumerate(words.types):
        nouns.setdefault(kind.name.split()[-1], []).append(code)
    for noun, codes in nouns.items():
        if 3 <= len(codes) <= 8:
            yield _Draft("category", (noun,), tuple(Want(code) for code in codes))


def _pool(kind: str, world: World) -> int:
    return 10 + POOLS[kind] * len(world.items.type) // POOL_ITEMS


def _negations(
    world: World, scenes: list[tuple[tuple[str, ...], tuple[Want, ...]]], rng: np.random.Generator
) -> Iterator[_Draft]:
    """A scene minus a colour, material or style that 5 to 60 % of its items show."""
    for _ in range(_pool("negation", world)):
        phrases, wants = scenes[int(rng.integers(len(scenes)))]
        items = eligible(world, wants, ())
        if not len(items):
            continue
        axis = ("colour", "material", "style")[int(rng.integers(3))]
        value = int(world.items.values[axis][items[int(rng.integers(len(items)))]])
        if 0.05 <= float(world.holds(axis, value)[items].mean()) <= 0.6:
            unwanted = world.names[axis][value] + (" style" if axis == "style" else "")
            texts = tuple(form.format(phrases[0], unwanted) for form in NEGATIONS)
            yield _Draft("negation", texts, wants, ((axis, value),))


def _dupes(world: World, rng: np.random.Generator) -> Iterator[_Draft]:
    """Same type and the brand's signature style, from another brand of a lower price tier."""
    brands, types = world.brands, world.words.types
    dear = np.flatnonzero(brands.tier > 0)
    for _ in range(_pool("dupe", world)):
        code = int(rng.integers(len(types)))
        brand = int(rng.choice(dear[brands.department[dear] == types[code].department]))
        tier = int(brands.tier[brand])
        texts = tuple(form.format(brands.names[brand], types[code].name) for form in DUPES)
        wants = (Want(code, (("style", int(brands.style[brand])),)),)
        dearer = tuple(("tier", higher) for higher in range(tier, int(brands.tier.max()) + 1))
        yield _Draft("dupe", texts, wants, (("brand", brand), *dearer))


def _attributes(world: World, rng: np.random.Generator) -> Iterator[_Draft]:
    """One or two values of a random item with its product type, or its brand with its product type."""
    for _ in range(_pool("attribute", world)):
        item = int(rng.integers(len(world.items.type)))
        kind = world.words.types[code := int(world.items.type[item])]
        if rng.random() < 0.12:
            brand = int(world.items.brand[item])
            name = world.brands.names[brand]
            yield _Draft(
                "attribute", (f"{name} {kind.name}", f"{kind.name} {name}"), (Want(code, (("brand", brand),)),)
            )
            continue
        axes = rng.choice(ATTRIBUTE_AXES, 2 if rng.random() < 0.15 else 1, replace=False, p=ATTRIBUTE_SHARES)
        found = [(str(axis), int(np.ravel(world.items.values[str(axis)][item])[0])) for axis in axes]
        constraints = tuple((axis, value) for axis, value in found if value >= 0)
        if constraints:
            said = " ".join(world.names[axis][value] for axis, value in constraints)
            texts = (f"{said} {kind.name}", f"{said} {kind.plural}", f"{kind.name} {said}")
            yield _Draft("attribute", texts, (Want(code, constraints),))
