"""The one decode loop: constrained beam search over a SID trie. Training, evaluation, the in-process runner and
Triton all call it with their own step function. Owns nothing of the model and nothing of HTTP.

Legend: K rows asked of the model, L levels, n results, t the level being written (0-based).
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from onesearch.errors import ConfigError, DecodeError
from trie import AnyMask, AnyTrie

Score = Literal["level", "legal"]


@dataclass(frozen=True)
class BeamConfig:
    """How to search. Raises ConfigError unless 1 <= top_n <= width and `score` is known.

    `score="level"`: log-softmax over all codes of the level, illegal codes then dropped: the model's own
    conditional. `score="legal"`: renormalised over the legal children, so a forced code costs nothing and beams with
    a single legal completion need no further model calls.

    `early_stop=n` > 0 asks the model for the last level in calls of n rows, best beams first, and stops when no beam
    that is left can reach the results: scores never rise along a path. The answer is the same.
    """

    width: int = 512
    top_n: int = 50
    score: Score = "level"
    early_stop: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("width", self.width, 1),
            ("top_n", self.top_n, 1),
            ("early_stop", self.early_stop, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise ConfigError(f"beam {name}: {value!r} is not an integer in {least}..2147483647")
        if self.top_n > self.width:
            raise ConfigError(f"beam top_n: {self.top_n} is more than width {self.width}")
        if self.score not in get_args(Score):
            raise ConfigError(f"beam score: {self.score!r} is not one of {', '.join(get_args(Score))}")

    def in_quarters(self) -> "BeamConfig":
        """The same search with the `early_stop` that pays on a CPU: a quarter of the beams a call.

        None when as many results as beams are wanted: few beams hold that many, so that it would not stop.
        """
        return replace(self, early_stop=self.width // 4 if self.top_n < self.width else 0)


@dataclass(frozen=True)
class BeamResult:
    """Best SIDs first; equal scores in code order. n = min(top_n, legal SIDs) while the beam covers them."""

    codes: npt.NDArray[np.uint16]
    """[n, L]"""
    scores: npt.NDArray[np.float32]
    """[n], sums of log-probabilities, descending"""
    leaves: npt.NDArray[np.int64]
    """[n], leaf index of each SID in the trie"""
    beams: tuple[int, ...]
    """beams kept on each of the L levels; empty when nothing is legal"""


class StepFn(Protocol):
    """The model, seen from the search."""

    def __call__(
        self, codes: npt.NDArray[np.uint16], parents: npt.NDArray[np.int64], /
    ) -> npt.NDArray[np.float32]:
        """Raw logits of level t, float32 [K, sizes[t]], for the prefixes codes [K, t], in code order.

        parents [K] are the row numbers these prefixes had, one code shorter, in the call for the *previous level*:
        gather beam state with them. The first call has codes [1, 0] and parents [0]. With `early_stop` the last
        level takes several calls, each with other prefixes; no state of that level is asked for again.
        """
        ...


def beam_search(step: StepFn, trie: AnyTrie, config: BeamConfig, mask: AnyMask | None = None) -> BeamResult:
    """The `top_n` best legal SIDs under `step`; `mask` (from `trie.subset`) restricts what is legal.

    Exact: equal to brute force over all legal SIDs whenever the width covers them, and never less than
    min(top_n, width, legal SIDs) results. `step` is called at most once per level (`early_stop` aside), and not at
    all for beams whose score cannot change any more (`score="legal"`). Raises DecodeError for logits of a wrong type
    or shape or with any value that is not finite; ValueError for a mask of another trie.
    """
    beam = trie.beam(config.width, config.top_n, legal=config.score == "legal", mask=mask, chunk=config.early_stop)
    sizes = trie.sizes
    while (level := beam.level) < len(sizes):
        shape = (beam.rows, sizes[level])
        if beam.rows:
            logits = _checked(step(beam.codes(), beam.parents()), shape, level)
        else:
            logits = np.empty(shape, dtype=np.float32)
        try:
            beam.advance(logits)
        except ValueError as error:
            raise DecodeError(f"level {level}: {error}") from None
    codes, scores, leaves = beam.results()
    return BeamResult(codes, scores, leaves, tuple(beam.kept))


def _checked(logits: object, shape: tuple[int, int], level: int) -> npt.NDArray[np.float32]:
    if not isinstance(logits, np.ndarray) or logits.dtype != np.float32:
        found = logits.dtype if isinstance(logits, np.ndarray) else type(logits).__name__
        raise DecodeError(f"level {level}: logits are {found}, expected a float32 array")
    if logits.shape != shape:
        raise DecodeError(f"level {level}: logits have shape {logits.shape}, expected {shape}")
    return np.ascontiguousarray(logits)
