"""Experiments: who takes part, and which arm answers them. Knows names of variants and nothing of what they do.

Experiments of one layer exclude each other: each owns a slot of the layer's users. Layers are independent: a user can
be in one experiment of each, and the options of both arms apply, so variants of different layers must not set the same
option. `ramp` is the share of the slot that takes part; raising it adds users and moves none between arms, because
slot, ramp and arm are decided by three independent hashes of the bucket key. An experiment that is not enabled sends
everybody back.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from onesearch.errors import ConfigError

JOIN = "+"
_MAX_COMBINATIONS = 256
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Experiment(BaseModel):
    """One table `[experiments.NAME]`. arms: variant name → weight; weights must stay as they are while it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arms: dict[str, Weight] = Field(min_length=1)
    layer: str = Field(default="main", min_length=1)
    slot: tuple[Share, Share] = (0.0, 1.0)
    ramp: Share = 1.0
    enabled: bool = True

    @model_validator(mode="after")
    def _slot_has_room(self) -> Self:
        if self.slot[0] >= self.slot[1]:
            raise ValueError(f"slot: {list(self.slot)} is empty, expected [from, to] with from < to")
        return self

    @property
    def traffic(self) -> float:
        """Share of all users that take part."""
        return (self.slot[1] - self.slot[0]) * self.ramp * self.enabled


@dataclass(frozen=True)
class Layers:
    """Experiments by layer. Raises ConfigError for slots of one layer that overlap."""

    salt: str
    experiments: Mapping[str, Experiment]

    def __post_init__(self) -> None:
        for layer, names in self.by_layer.items():
            ordered = sorted(names, key=lambda name: self.experiments[name].slot)
            for one, other in pairwise(ordered):
                if self.experiments[other].slot[0] < self.experiments[one].slot[1]:
                    raise ConfigError(
                        f"experiments: {one} and {other} overlap in layer {layer!r}, expected disjoint slots"
                    )

    @cached_property
    def by_layer(self) -> dict[str, list[str]]:
        """Names of the experiments of each layer, layers in order of their names."""
        layers: dict[str, list[str]] = {}
        for name, experiment in sorted(self.experiments.items(), key=lambda pair: pair[1].layer):
            layers.setdefault(experiment.layer, []).append(name)
        return layers

    def arms(self, key: str) -> dict[str, str]:
        """The arm of every experiment that a bucket key takes part in, in order of the layers."""
        found: dict[str, str] = {}
        for layer, names in self.by_layer.items():
            place = point(self.salt, "layer", layer, key)
            for name in names:
                experiment = self.experiments[name]
                inside = experiment.slot[0] <= place < experiment.slot[1]
                if inside and experiment.enabled and point(self.salt, "ramp", name, key) < experiment.ramp:
                    found[name] = pick(experiment.arms, point(self.salt, "arm", name, key))
        return found

    def combinations(self, default: str) -> dict[str, float]:
        """Every name that `joined` can give with its share of the users; the default variant comes first."""
        options: list[dict[str, float]] = []
        for names in self.by_layer.values():
            shares = {default: 1.0 - sum(self.experiments[name].traffic for name in names)}
            for name in names:
                experiment, total = self.experiments[name], sum(self.experiments[name].arms.values())
                for arm, weight in experiment.arms.items():
                    shares[arm] = shares.get(arm, 0.0) + experiment.traffic * weight / total
            options.append(shares)
        found: dict[str, float] = {default: 0.0}
        for chosen in product(*(shares.items() for shares in options)):
            name, share = joined([arm for arm, _ in chosen], default), 1.0
            for _, part in chosen:
                share *= part
            found[name] = found.get(name, 0.0) + share
        if len(found) > _MAX_COMBINATIONS:
            raise ConfigError(
                f"experiments: {len(found)} combinations of arms, expected at most {_MAX_COMBINATIONS}"
            )
        return found


def joined(arms: Sequence[str], default: str) -> str:
    """Name of what arms of different layers give together: those that are not the default, joined by `+`."""
    return JOIN.join(arm for arm in arms if arm != default) or default


def point(*parts: str) -> float:
    """A uniform point in [0, 1) that depends on the parts alone."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def pick(weights: Mapping[str, float], at: float) -> str:
    """The name whose slice of [0, 1), in proportion to its weight, holds `at`; names of weight 0 have none."""
    left = at * sum(weights.values())
    chosen = ""
    for name, weight in weights.items():
        if weight > 0:
            chosen = name
            left -= weight
            if left < 0:
                break
    return chosen
