"""The SID grammar: levels, sizes, token strings, and the only arithmetic on SID token ids.

A SID is L codes from coarse to fine. In tokens, level t of code m is `<a_m>`, `<b_m>`, `<c_m>` and the two OPQ
codes share the family `d` with the second offset by the size of the first (spec §3.4), so the grammar is
positional: only `SidVocab` knows which token id belongs to which level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from onesearch.errors import ConfigError

Codes = npt.NDArray[np.uint16]

RQ_LEVELS = 3
OPQ_CODES = 2
LEVELS = RQ_LEVELS + OPQ_CODES
_FAMILIES = "abcdd"


@dataclass(frozen=True)
class SidSpec:
    """Codebook size of each level, coarse to fine: three RQ levels, then two OPQ codes."""

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.sizes) != LEVELS:
            raise ConfigError(f"sid sizes: {list(self.sizes)} has {len(self.sizes)} levels, expected {LEVELS}")
        for level, size in enumerate(self.sizes):
            if not 1 <= size <= 65535:
                raise ConfigError(f"sid sizes[{level}]: {size} is not in 1..65535")

    @property
    def offsets(self) -> tuple[int, ...]:
        """First position of each level in the concatenated SID vocabulary, plus the total; L + 1 ints."""
        return (0, *accumulate(self.sizes))

    def token_strings(self) -> list[str]:
        """All SID tokens in vocabulary order, e.g. `<a_0>` … `<d_511>`."""
        tokens: list[str] = []
        for level, size in enumerate(self.sizes):
            shift = self.sizes[RQ_LEVELS] if level == LEVELS - 1 else 0
            tokens += [f"<{_FAMILIES[level]}_{code + shift}>" for code in range(size)]
        return tokens

    def text(self, codes: Sequence[int]) -> str:
        """One SID as people read it: `<a_3><b_0><c_7><d_1><d_260>`."""
        strings = self.token_strings()
        return "".join(strings[self.offsets[t] + int(c)] for t, c in enumerate(codes))


@dataclass(frozen=True)
class SidVocab:
    """SID codes to language-model token ids; SID tokens occupy `first_id … first_id + sum(sizes) - 1`."""

    spec: SidSpec
    first_id: int

    def token_ids(self, codes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Codes [..., t] with t ≤ L → token ids [..., t], int64."""
        array = np.asarray(codes, dtype=np.int64)
        return array + self._first_ids[: array.shape[-1]]

    @cached_property
    def _first_ids(self) -> npt.NDArray[np.int64]:
        """First token id of each level, int64 [L]."""
        return self.first_id + np.asarray(self.spec.offsets[:-1], dtype=np.int64)

    def level_range(self, level: int) -> tuple[int, int]:
        """First token id of a level and one past its last."""
        return self.first_id + self.spec.offsets[level], self.first_id + self.spec.offsets[level + 1]

    def codes(self, ids: npt.ArrayLike) -> Codes:
        """Token ids [..., L] → codes [..., L], uint16. Raises ValueError for an id outside its level."""
        array = np.asarray(ids, dtype=np.int64)
        codes = array - self._first_ids[: array.shape[-1]]
        sizes = np.asarray(self.spec.sizes[: array.shape[-1]])
        bad = (codes < 0) | (codes >= sizes)
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(f"token id {int(array[where])} at {where} is not a SID token of level {where[-1]}")
        return codes.astype(np.uint16)
