"""One search from raw context to ranked rows: understand, render, select, prefill, decode, expand.

Serving, evaluation and the golden examples of a bundle all run this function; they differ only in the decoder.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from onesearch.bundle import Bundle, GoldenExample
from onesearch.catalog import Filters, Rows
from onesearch.context import SearchContext, SidLookup
from onesearch.decode import BeamConfig, BeamResult, Score, StepFn, beam_search
from onesearch.errors import DeadlineError
from onesearch.facets import Facets, count_facets
from onesearch.live import LiveCatalog, Popularity, Selection, Snapshot
from onesearch.negation import permitted
from onesearch.runtime import Decoder
from onesearch.sequence import Prompt
from onesearch.sid import Codes
from onesearch.text import content_words

GOLDEN_TOP = 50
GOLDEN_TOLERANCE = {"fp32": 1e-3, "fp16": 0.5, "int8": 0.5}


@dataclass(frozen=True)
class SearchOptions:
    """limit items of the answer; width beams; keywords: whether to match keywords into the prompt.

    match: whether the items that hold the most of the query's words come before all others. facets: whether to count
    the candidates. deadline: the `time.monotonic()` after which nobody waits for the answer
    any more; it is no part of equality.
    """

    limit: int = 20
    width: int = 512
    score: Score = "level"
    keywords: bool = False
    match: bool = False
    filters: Filters | None = None
    facets: bool = False
    deadline: float = field(default=math.inf, compare=False, repr=False)


@dataclass(frozen=True)
class SearchResult:
    """rows: int64 [n] rows of `catalog`, best first. scores: float32 [n], the log-probability of each row's SID.
    matched: how many of the first rows were put before the others because they hold the query's words.

    beams: beams kept per level. timings_ms: wall time per stage. eligible: items that pass the filters.
    degraded: what the search had to do without. model_version: the model that answered, None for the bundle's own.
    facets: of the candidates, None unless they were asked for.
    """

    catalog: Snapshot
    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    query_sid: Codes
    keywords: tuple[str, ...]
    beams: tuple[int, ...]
    timings_ms: dict[str, float]
    eligible: int
    degraded: tuple[str, ...] = ()
    model_version: str | None = None
    facets: Facets | None = None
    matched: int = 0


@dataclass
class Clock:
    """Wall time per named stage, in milliseconds; a stage entered twice adds up.

    A kernel that runs cannot be interrupted, so the deadline (`time.monotonic()`) is looked at between stages and
    before every level of the decode. degraded and model_version: see `SearchResult`.
    """

    timings: dict[str, float] = field(default_factory=dict)
    deadline: float = math.inf
    degraded: list[str] = field(default_factory=list)
    model_version: str | None = None

    def check(self) -> None:
        """Raises DeadlineError when the time is up."""
        if time.monotonic() > self.deadline:
            raise DeadlineError(f"the deadline passed after {' + '.join(self.timings) or 'no stage'}")

    def timely(self, step: StepFn) -> StepFn:
        """The same step function, which starts no level after the deadline."""

        def timely(codes: Codes, parents: npt.NDArray[np.int64], /) -> npt.NDArray[np.float32]:
            self.check()
            return step(codes, parents)

        return timely

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.check()
        start = time.perf_counter()
        yield
        self.timings[name] = round(self.timings.get(name, 0.0) + (time.perf_counter() - start) * 1e3, 3)


class Searcher:
    """Searches one bundle with one decoder. Thread-safe if the decoder is.

    live holds the items, which may change at any time; popularity, if any, replaces the catalog's own.
    """

    def __init__(self, bundle: Bundle, decoder: Decoder) -> None:
        self.bundle = bundle
        self.live = LiveCatalog(
            bundle.catalog, bundle.trie, bundle.manifest.catalog_version, bundle.encoder.query_sids
        )
        self.popularity: Popularity | None = None
        self._decoder = decoder

    def search(self, context: SearchContext, options: SearchOptions) -> SearchResult:
        """The best min(limit, eligible) items for a context, all of one moment of the catalog.

        The beam is never narrower than the limit, so that it cannot run out of SIDs: each holds an eligible item.
        Raises DecodeError if the model fails and DeadlineError when the time of the options runs out.
        """
        clock, catalog = Clock(deadline=options.deadline), self.live.snapshot
        with clock.stage("understand"):
            if options.keywords and not context.keywords:
                context = replace(context, keywords=self.bundle.keywords.match(context.query))
            prompt, query_sid = self.render(context, catalog)
        with clock.stage("mask"):
            selection = catalog.select(options.filters)
            matching = None
            if options.match:
                wanted_words = permitted(content_words(context.query), context.query)
                matching = catalog.select_words(wanted_words, options.filters)
        width = max(options.width, options.limit)
        wanted = width if options.facets else options.limit
        config = BeamConfig(width, wanted, options.score).in_quarters()
        rows, scores, beams = self._best(prompt, config, catalog, matching or selection, clock)
        matched = len(rows) if matching else 0
        if matching and matched < min(wanted, selection.count):
            others, their_scores, beams = self._best(prompt, config, catalog, selection, clock)
            late = ~np.isin(others, rows)
            rows = np.concatenate([rows, others[late]])[:wanted]
            scores = np.concatenate([scores, their_scores[late]])[:wanted]
        facets = None
        if options.facets:
            with clock.stage("facets"):
                facets = count_facets(catalog, rows)
            rows, scores = rows[: options.limit], scores[: options.limit]
        return SearchResult(
            catalog=catalog,
            rows=rows,
            scores=scores,
            query_sid=query_sid,
            keywords=context.keywords,
            beams=beams,
            timings_ms=clock.timings,
            eligible=selection.count,
            degraded=tuple(clock.degraded),
            model_version=clock.model_version,
            facets=facets,
            matched=min(matched, len(rows)),
        )

    def _best(
        self, prompt: Prompt, config: BeamConfig, catalog: Snapshot, selection: Selection, clock: Clock
    ) -> tuple[Rows, npt.NDArray[np.float32], tuple[int, ...]]:
        """The best `top_n` selected rows, int64 [n], their scores, float32 [n], and the beams kept per level."""
        found = self.decode(prompt, config, selection, clock)
        with clock.stage("expand"):
            rows, sources = catalog.expand(found.leaves, config.top_n, selection, self.popularity)
        return rows, found.scores[sources], found.beams

    def render(self, context: SearchContext, items: SidLookup | None = None) -> tuple[Prompt, Codes]:
        """The model input of a context and the query's SID uint16 [L]; items: where its history is looked up, by
        default the bundle's own."""
        fields = self.bundle.encoder.fields(context, items=items)
        assert fields.query_sid is not None
        return self.bundle.renderer.prompt("search", fields), fields.query_sid

    def decode(
        self, prompt: Prompt, config: BeamConfig, selection: Selection | None = None, clock: Clock | None = None
    ) -> BeamResult:
        """Beam search for a rendered prompt over the SIDs of the selected items, by default the bundle's own.

        The one part of a search that may run elsewhere: a searcher whose model is on a server overrides it.
        """
        clock = clock or Clock()
        trie, mask = (self.bundle.trie, None) if selection is None else (selection.trie, selection.mask)
        with clock.stage("prefill"):
            step = self._decoder.start(prompt)
        with clock.stage("decode"):
            return beam_search(clock.timely(step), trie, config, mask)


def golden_example(searcher: Searcher, context: SearchContext, width: int = 512) -> GoldenExample:
    """Record what this searcher does for a context."""
    prompt, _ = searcher.render(context)
    found = searcher.decode(prompt, BeamConfig(width=width, top_n=min(GOLDEN_TOP, width)))
    return GoldenExample(
        context=context,
        ids=tuple(prompt.ids.tolist()),
        codes=tuple(tuple(row) for row in found.codes.tolist()),
        scores=tuple(found.scores.tolist()),
    )


def replay(
    searcher: Searcher, examples: Sequence[GoldenExample], precision: str = "fp32", width: int = 512
) -> list[str]:
    """Faults of golden examples: prompt ids must be equal, the top SIDs and scores equal within the precision's
    tolerance.

    Two SIDs may trade places only when their recorded scores differ by less than the tolerance.
    """
    faults: list[str] = []
    for number, golden in enumerate(examples):
        found = golden_example(searcher, golden.context, width)
        if found.ids != golden.ids:
            faults.append(f"example {number}: prompt renders to other ids")
        elif (gap := score_gap(golden, found)) > GOLDEN_TOLERANCE[precision]:
            faults.append(f"example {number}: scores differ by {gap:.2g}, allowed {GOLDEN_TOLERANCE[precision]}")
    return faults


class Ranked(Protocol):
    """SIDs with scores, best first: a BeamResult or a GoldenExample."""

    @property
    def codes(self) -> npt.ArrayLike: ...

    @property
    def scores(self) -> npt.ArrayLike: ...


def score_gap(expected: Ranked, found: Ranked) -> float:
    """Largest score difference by rank and by SID; a SID found by one alone counts by its distance to the last.

    So two SIDs may trade places, or one drop out at the end, only when their scores are as close as the limit.
    Infinite when the numbers of SIDs differ.
    """
    scores, others = np.asarray(expected.scores), np.asarray(found.scores)
    if len(scores) != len(others):
        return math.inf
    if not len(scores):
        return 0.0
    by_sid = dict(zip(map(tuple, np.asarray(found.codes).tolist()), others.tolist(), strict=True))
    pairs = zip(map(tuple, np.asarray(expected.codes).tolist()), scores.tolist(), strict=True)
    gaps = [abs(score - by_sid.get(code, float(scores[-1]))) for code, score in pairs]
    return float(max(np.abs(scores - others).max(), *gaps))
