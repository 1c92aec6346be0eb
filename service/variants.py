"""Variants: which bundle and search options answer a request, and the sticky split between them.

A request's bucket key is hashed with a salt to a point in [0, 1); variants own slices of that interval in
proportion to their weights. The same key always meets the same variant, in every process.
"""

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onesearch.decode import Score
from onesearch.errors import ConfigError

DEFAULT_SALT = "onesearch"
DEFAULT_VARIANT = "default"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class VariantOptions(BaseModel):
    """How one variant searches. bundle: folder name of its bundle; it may be left out when only one is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str | None = None
    keywords: bool = False
    width: int = Field(default=512, ge=1, le=4096)
    score: Score = "level"
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)


class _Table(BaseModel):
    """The shape of a variants file, and of the `variants` key of a bundle's recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt: str = Field(default=DEFAULT_SALT, min_length=1)
    variants: dict[Annotated[str, Field(pattern=_NAME)], VariantOptions] = Field(min_length=1)


class Split:
    """Named variants with a deterministic, weighted assignment of bucket keys."""

    def __init__(self, variants: Mapping[str, VariantOptions], salt: str = DEFAULT_SALT) -> None:
        self.variants = dict(variants)
        self._salt = salt
        self._total = sum(v.weight for v in self.variants.values())
        if self._total <= 0:
            raise ConfigError(f"variants: the weights of {', '.join(self.variants)} add up to 0, expected more")

    def assign(self, key: str) -> str:
        """The variant of a bucket key. Variants of weight 0 are only reached by name."""
        digest = hashlib.sha256(f"{self._salt}\0{key}".encode("utf-8", "surrogatepass")).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64 * self._total
        chosen = ""
        for name, variant in self.variants.items():
            if variant.weight > 0:
                chosen = name
                point -= variant.weight
                if point < 0:
                    break
        return chosen


def read_split(path: Path, bundles: Sequence[str]) -> Split:
    """Variants of a TOML file (`salt`, `[variants.NAME]`) for the named bundles. Raises ConfigError."""
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"variants file {path}: {error}") from error
    table = _parse(f"variants file {path}", raw)
    named = {name: _placed(str(path), name, options, bundles) for name, options in table.variants.items()}
    return Split(named, table.salt)


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
    return Split(variants)


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
        raise ConfigError(f"variants file {source}: variants.{name}.bundle: {fault}")
    return options
