"""Whether exported graphs compute what the torch model computes, on the golden examples of their bundle."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnxruntime import InferenceSession

from model_export.search_inputs import SearchShape, results
from onesearch.bundle import Bundle
from onesearch.decode import BeamConfig, BeamResult, StepFn, beam_search
from onesearch.runtime import Decoder, Ids, Logits
from onesearch.search import GOLDEN_TOLERANCE, Searcher, score_gap
from onesearch.sequence import Prompt
from onesearch.sid import Codes

TOP = 10
Type = Literal["fp32", "int8", "fp16", "bf16"]


@dataclass(frozen=True)
class Limits:
    """Largest differences and smallest mean overlap allowed."""

    logits: float = inf
    scores: float = inf
    overlap: float = 0.0


# int8 must keep its scores near enough for readiness; `gate` judges its results.
LIMITS: dict[Type, Limits] = {
    "fp32": Limits(logits=1e-4, scores=1e-4),
    "int8": Limits(scores=GOLDEN_TOLERANCE["int8"]),
    "fp16": Limits(logits=1e-2, overlap=0.95),
    "bf16": Limits(logits=1e-1, overlap=0.95),
}


@dataclass(frozen=True)
class Comparison:
    """One golden example under both decoders.

    logits: largest difference of a step's logits over the largest magnitude of that step; None for the search graph,
    which shows none. scores: largest difference of final scores, by rank and by SID. overlap: share of the top TOP
    SIDs in common. identical: whether all SIDs found (the top 50) are the same in the same order.
    """

    query: str
    logits: float | None
    scores: float
    overlap: float
    identical: bool = False


@dataclass(frozen=True)
class Parity:
    """All comparisons of one graph, or of the decoder graphs of one type; `graph` names it in reports."""

    precision: Type
    rows: tuple[Comparison, ...]
    graph: str = ""

    def summary(self) -> dict[str, Any]:
        """The worst differences and the mean overlap, for the stamp."""
        logits = [row.logits for row in self.rows if row.logits is not None]
        return {
            "examples": len(self.rows),
            **({"logits": max(logits)} if logits else {}),
            "scores": max(row.scores for row in self.rows),
            f"overlap_top_{TOP}": self._overlap(),
            "identical_top_50": sum(row.identical for row in self.rows) / len(self.rows),
        }

    def faults(self) -> list[str]:
        """One line per measure that is over its limit, naming the worst example; empty when the graphs agree."""
        name, limits = self.graph or self.precision, LIMITS[self.precision]
        measures: tuple[tuple[str, Callable[[Comparison], float], float], ...] = (
            ("logits", lambda row: row.logits or 0.0, limits.logits),
            ("scores", lambda row: row.scores, limits.scores),
        )
        faults = []
        for what, measure, limit in measures:
            worst = max(range(len(self.rows)), key=lambda i: measure(self.rows[i]))
            row = self.rows[worst]
            if not measure(row) <= limit:
                faults.append(
                    f"{name}: {what} differ by {measure(row):.3g} on example {worst} ({row.query!r}), "
                    f"allowed {limit:g}"
                )
        if self._overlap() < limits.overlap:
            worst = min(range(len(self.rows)), key=lambda i: self.rows[i].overlap)
            faults.append(
                f"{name}: {self._overlap():.3f} of the top {TOP} in common, expected {limits.overlap:g}; least on "
                f"example {worst} ({self.rows[worst].query!r}), {self.rows[worst].overlap:.2f}"
            )
        return faults

    def _overlap(self) -> float:
        return sum(row.overlap for row in self.rows) / len(self.rows)


def measure(
    bundle: Bundle, reference: Decoder, candidate: Decoder, precision: Type, config: BeamConfig | None = None
) -> Parity:
    """Run every golden example through both decoders; the bundle must have at least one."""
    searcher, config = Searcher(bundle, reference), config or BeamConfig()
    rows = []
    for example in bundle.examples:
        prompt, _ = searcher.render(example.context)
        twin = _Twin(reference, candidate, prompt)
        expected = beam_search(twin, bundle.trie, config)
        found = beam_search(candidate.start(prompt), bundle.trie, config)
        rows.append(_comparison(example.context.query, twin.worst, expected, found))
    return Parity(precision, tuple(rows))


def measure_search(bundle: Bundle, reference: Decoder, graph: Path, precision: Type) -> Parity:
    """Run every golden example through a search graph, in ONNX Runtime on the CPU, and through the decode loop."""
    shape = SearchShape.load(graph.with_suffix(".json"))
    session = InferenceSession(graph, providers=["CPUExecutionProvider"])
    searcher, config = Searcher(bundle, reference), BeamConfig(shape.width, shape.top_n)
    trie = shape.trie_feeds(bundle.trie)
    rows = []
    for start in range(0, len(bundle.examples), shape.batch):
        examples = bundle.examples[start : start + shape.batch]
        prompts = [searcher.render(example.context)[0] for example in examples]
        feeds = shape.request_feeds(prompts, [None] * len(prompts), bundle.trie.num_sids)
        answers = results(*session.run(["codes", "scores", "leaves"], feeds | trie))
        for example, prompt, found in zip(examples, prompts, answers, strict=False):
            expected = beam_search(reference.start(prompt), bundle.trie, config)
            rows.append(_comparison(example.context.query, None, expected, found))
    return Parity(precision, tuple(rows), graph.stem)


def _comparison(query: str, logits: float | None, expected: BeamResult, found: BeamResult) -> Comparison:
    identical = np.array_equal(expected.codes, found.codes)
    return Comparison(query, logits, score_gap(expected, found), _overlap(expected, found), identical)


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
