"""Variants, which bundle and search options answer a request, and the sticky split of the traffic between them.

Without experiments a variant owns a slice of [0, 1) in proportion to its weight, and a request goes where its bucket
key is hashed to. With experiments (`experiments.py`) the first variant, or the one named `default`, answers whoever is
in none. The same key always meets the same variant, in every process.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onesearch.decode import Score
from onesearch.errors import ConfigError
from service.experiments import JOIN, Experiment, Layers, joined, pick, point

DEFAULT_SALT = "onesearch"
DEFAULT_VARIANT = "default"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class VariantOptions(BaseModel):
    """How one variant searches. bundle: folder name of its bundle; it may be left out when only one is served.

    The others are those of `SearchOptions`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str | None = None
    keywords: bool = False
    match: bool = False
    width: int = Field(default=512, ge=1, le=4096)
    score: Score = "level"
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)


class _Table(BaseModel):
    """The shape of an experiments file; a bundle's recipe declares only variants."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt: str = Field(default=DEFAULT_SALT, min_length=1)
    default: str | None = None
    variants: dict[Annotated[str, Field(pattern=_NAME)], VariantOptions] = Field(min_length=1)
    experiments: dict[Annotated[str, Field(pattern=_NAME)], Experiment] = {}


@dataclass(frozen=True)
class Assignment:
    """The variant of a bucket key, and its arm in every experiment it takes part in."""

    variant: str
    arms: Mapping[str, str] = field(default_factory=dict)


class Split(Protocol):
    """Named variants with a deterministic assignment of bucket keys."""

    @property
    def variants(self) -> Mapping[str, VariantOptions]:
        """Every variant that can answer, by name."""
        ...

    @property
    def shares(self) -> Mapping[str, float]:
        """The expected share of the users of each variant."""
        ...

    @property
    def experiments(self) -> Mapping[str, Experiment]:
        """The experiments, running or not."""
        ...

    def assign(self, key: str) -> Assignment:
        """The variant of a bucket key."""
        ...


class WeightedSplit:
    """Variants by weight. Those of weight 0 are only reached by name. Raises ConfigError if all are 0."""

    def __init__(self, variants: Mapping[str, VariantOptions], salt: str = DEFAULT_SALT) -> None:
        self.variants = dict(variants)
        self.experiments: Mapping[str, Experiment] = {}
        self._salt = salt
        self._weights = {name: variant.weight for name, variant in self.variants.items()}
        total = sum(self._weights.values())
        if total <= 0:
            raise ConfigError(f"variants: the weights of {', '.join(self.variants)} add up to 0, expected more")
        self.shares = {name: weight / total for name, weight in self._weights.items()}

    def assign(self, key: str) -> Assignment:
        """See `Split.assign`."""
        return Assignment(pick(self._weights, point(self._salt, key)))


class ExperimentSplit:
    """A default variant and experiments. Raises ConfigError for arms that are unknown or set the same option."""

    def __init__(
        self,
        variants: Mapping[str, VariantOptions],
        experiments: Mapping[str, Experiment],
        default: str,
        salt: str,
    ) -> None:
        self.experiments = dict(experiments)
        self._layers, self._default = Layers(salt, self.experiments), default
        _check_arms(variants, self._layers, default)
        self.shares = self._layers.combinations(default)
        alone = {name: 0.0 for name in variants if name not in self.shares}
        self.shares |= alone
        self.variants = {name: _combined(name, variants, default) for name in self.shares}

    def assign(self, key: str) -> Assignment:
        """See `Split.assign`."""
        arms = self._layers.arms(key)
        return Assignment(joined(list(arms.values()), self._default), arms)


def _check_arms(variants: Mapping[str, VariantOptions], layers: Layers, default: str) -> None:
    owner: dict[str, str] = {}
    for layer, names in layers.by_layer.items():
        for name in names:
            for arm in layers.experiments[name].arms:
                if arm not in variants:
                    raise ConfigError(f"experiments.{name}.arms: {arm!r} is not one of {', '.join(variants)}")
                for option in () if arm == default else _own(variants[arm]):
                    if owner.setdefault(option, layer) != layer:
                        fault = f"variant {arm!r} sets {option!r}, which layer {owner[option]!r} sets too"
                        raise ConfigError(f"experiments.{name}: {fault}; expected options of one layer only")


def _own(variant: VariantOptions) -> dict[str, Any]:
    """The options that a variant's table sets."""
    return {name: getattr(variant, name) for name in sorted(variant.model_fields_set - {"weight"})}


def _combined(name: str, variants: Mapping[str, VariantOptions], default: str) -> VariantOptions:
    """The default's options, then those that each joined variant sets."""
    options = variants[default]
    for part in name.split(JOIN):
        options = options.model_copy(update=_own(variants[part]))
    return options


def read_split(path: Path, bundles: Sequence[str]) -> Split:
    """Variants of a TOML file for the named bundles: `salt`, `[variants.NAME]`, and with `[experiments.NAME]` also the
    `default` variant, the first one if it is not said. Raises ConfigError.
    """
    table = _read(path)
    default = table.default or next(iter(table.variants))
    if default not in table.variants:
        raise ConfigError(
            f"experiments file {path}: default: {default!r} is not one of {', '.join(table.variants)}"
        )
    first = _placed(str(path), default, table.variants[default], bundles)
    if not table.experiments:
        return WeightedSplit(
            {name: _placed(str(path), name, options, bundles) for name, options in table.variants.items()},
            table.salt,
        )
    for name, options in table.variants.items():
        if "weight" in options.model_fields_set:
            fault = "weight: is for files without experiments, whose arms have weights"
            raise ConfigError(f"experiments file {path}: variants.{name}.{fault}")
        if options.bundle is not None:
            _placed(str(path), name, options, bundles)
    return ExperimentSplit(dict(table.variants) | {default: first}, table.experiments, default, table.salt)


def read_experiment(path: Path, name: str) -> Experiment:
    """One experiment of a TOML file. Raises ConfigError."""
    experiments = _read(path).experiments
    if name not in experiments:
        raise ConfigError(f"experiments file {path}: {name!r} is not one of {', '.join(experiments) or 'none'}")
    return experiments[name]


def _read(path: Path) -> _Table:
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"experiments file {path}: {error}") from error
    return _parse(f"experiments file {path}", raw)


def declared_split(recipes: Mapping[str, Mapping[str, Any]]) -> Split:
    """Variants that bundles declare in the `variants` key of their recipe; keys of `recipes` name the bundles.

    A bundle that declares none has one variant, "default". With several bundles every name is prefixed
    `BUNDLE.`, so that names stay apart. Raises ConfigError.
    """
    variants: dict[str, VariantOptions] = {}
    for bundle, recipe in recipes.items():
        declared = recipe.get("variants") or {DEFAULT_VARIANT: {}}
        table = _parse(f"recipe of bundle {bundle}", {"variants": declared})
        for name, options in table.variants.items():
            if options.bundle is not None:
                raise ConfigError(f"recipe of bundle {bundle}: variants.{name}.bundle is not allowed here")
            full = name if len(recipes) == 1 else f"{bundle}.{name}"
            variants[full] = options.model_copy(update={"bundle": bundle})
    return WeightedSplit(variants)


def _parse(source: str, raw: Mapping[str, Any]) -> _Table:
    try:
        return _Table.model_validate(raw)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['input']!r} is wrong: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n  - ".join([f"{source}: {len(faults)} fault(s)", *faults])) from error


def _placed(source: str, name: str, options: VariantOptions, bundles: Sequence[str]) -> VariantOptions:
    if options.bundle is None and len(bundles) == 1:
        return options.model_copy(update={"bundle": bundles[0]})
    if options.bundle not in bundles:
        fault = f"{options.bundle!r} is not served, expected one of {', '.join(bundles)}"
        raise ConfigError(f"experiments file {source}: variants.{name}.bundle: {fault}")
    return options
