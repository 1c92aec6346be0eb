"""Whether exported graphs compute what the torch model computes, on the golden examples of their bundle."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from onesearch.bundle import Bundle
from onesearch.decode import BeamConfig, BeamResult, StepFn, beam_search
from onesearch.runtime import Decoder, Ids, Logits, Precision
from onesearch.search import GOLDEN_TOLERANCE, Searcher, score_gap
from onesearch.sequence import Prompt
from onesearch.sid import Codes

TOP = 10


@dataclass(frozen=True)
class Limits:
    """Largest differences allowed. int8 must keep its scores near enough for readiness; `gate` judges its results."""

    logits: float = inf
    scores: float = inf


LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(logits=1e-4, scores=1e-4),
    "int8": Limits(scores=GOLDEN_TOLERANCE["int8"]),
}


@dataclass(frozen=True)
class Comparison:
    """One golden example under both decoders.

    logits: largest difference of a step's logits over the largest magnitude of that step. scores: largest
    difference of final scores, by rank and by SID. overlap: share of the top TOP SIDs in common.
    """

    query: str
    logits: float
    scores: float
    overlap: float


@dataclass(frozen=True)
class Parity:
    """All comparisons of one precision."""

    precision: Precision
    rows: tuple[Comparison, ...]

    def summary(self) -> dict[str, Any]:
        """The worst differences and the mean overlap, for the stamp."""
        return {
            "examples": len(self.rows),
            "logits": max(row.logits for row in self.rows),
            "scores": max(row.scores for row in self.rows),
            f"overlap_top_{TOP}": sum(row.overlap for row in self.rows) / len(self.rows),
        }

    def faults(self) -> list[str]:
        """One line per measure that is over its limit, naming the worst example; empty when the graphs agree."""
        limits = LIMITS[self.precision]
        measures: tuple[tuple[str, Callable[[Comparison], float], float], ...] = (
            ("logits", lambda row: row.logits, limits.logits),
            ("scores", lambda row: row.scores, limits.scores),
        )
        faults = []
        for name, measure, limit in measures:
            worst = max(range(len(self.rows)), key=lambda i: measure(self.rows[i]))
            row = self.rows[worst]
            if not measure(row) <= limit:
                faults.append(
                    f"{self.precision}: {name} differ by {measure(row):.3g} on example {worst} ({row.query!r}), "
                    f"allowed {limit:g}"
                )
        return faults


def measure(
    bundle: Bundle, reference: Decoder, candidate: Decoder, precision: Precision, config: BeamConfig | None = None
) -> Parity:
    """Run every golden example through both decoders; the bundle must have at least one."""
    searcher, config = Searcher(bundle, reference), config or BeamConfig()
    rows = []
    for example in bundle.examples:
        prompt, _ = searcher.render(example.context)
        twin = _Twin(reference, candidate, prompt)
        expected = beam_search(twin, bundle.trie, config)
        found = beam_search(candidate.start(prompt), bundle.trie, config)
        overlap = _overlap(expected, found)
        rows.append(Comparison(example.context.query, twin.worst, score_gap(expected, found), overlap))
    return Parity(precision, tuple(rows))


class _Twin:
    """A step function that asks both decoders, remembers how far apart they were, and answers as the reference."""

    def __init__(self, reference: Decoder, candidate: Decoder, prompt: Prompt) -> None:
        self._steps: tuple[StepFn, StepFn] = reference.start(prompt), candidate.start(prompt)
        self.worst = 0.0

    def __call__(self, codes: Codes, parents: Ids, /) -> Logits:
        expected, found = (step(codes, parents) for step in self._steps)
        gap = float(np.abs(expected - found).max() / np.abs(expected).max())
        self.worst = max(self.worst, gap if np.isfinite(gap) else inf)
        return expected


def _overlap(expected: BeamResult, found: BeamResult) -> float:
    top = {tuple(code) for code in expected.codes[:TOP].tolist()}
    return len(top & {tuple(code) for code in found.codes[:TOP].tolist()}) / len(top)
