"""What is served: the opened bundles and the variants that split the traffic between them."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from onesearch.bundle import Bundle, open_bundle
from onesearch.errors import BundleError, ConfigError, FaultsError, OneSearchError
from onesearch.live import LiveCatalog
from onesearch.rates import CalibratedRates
from onesearch.runtime import Decoder, open_decoder
from onesearch.search import Searcher, SearchOptions, replay
from service.inference import EmbeddedRunner, InferenceRunner, own_cores, search_threads
from service.settings import Settings
from service.variants import Split, VariantOptions, declared_split, read_split

EXAMPLE_QUERIES = 8
EMBEDDED = "embedded"


@dataclass(frozen=True)
class Engine:
    """One open bundle with the runner that searches it. check replays its golden examples and returns faults.

    watched: the check may change its mind at any time, because the model is on a server.
    identifiers names what turns items into SIDs: engines of the same identifiers and items share what is made of them.
    """

    name: str
    model_version: str
    identifiers: str
    live: LiveCatalog
    runner: InferenceRunner
    check: Callable[[], list[str]]
    watched: bool = False
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One named way of answering."""

    name: str
    engine: Engine
    options: VariantOptions

    def search_options(self, limit: int, **more: Any) -> SearchOptions:
        """The search options of a request that this variant answers; more: those that the variant does not say."""
        own = self.options
        return SearchOptions(limit=limit, width=own.width, score=own.score, match=own.match, **more)


@dataclass(frozen=True)
class Traffic:
    """The variants by name and the split between them, which change together."""

    variants: Mapping[str, Variant]
    split: Split


class Deployment:
    """The engines, which stay while the service runs, and the traffic, which may be replaced between two requests."""

    def __init__(self, engines: Sequence[Engine], split: Split, rates: CalibratedRates | None = None) -> None:
        """rates: what orders the items of one SID in all engines; live events change it."""
        self.engines = tuple(engines)
        self.rates = rates or CalibratedRates()
        self.traffic = self._traffic(split)

    @property
    def variants(self) -> Mapping[str, Variant]:
        """The variants served now."""
        return self.traffic.variants

    def adopt(self, split: Split) -> None:
        """Serve another split from the next request on."""
        self.traffic = self._traffic(split)

    def _traffic(self, split: Split) -> Traffic:
        engines = {engine.name: engine for engine in self.engines}
        variants = {n: Variant(n, engines[str(o.bundle)], o) for n, o in split.variants.items()}
        return Traffic(variants, split)


def open_deployment(paths: Sequence[Path], settings: Settings) -> Deployment:
    """Open every bundle and the variants. Raises BundleError that lists the faults of all of them."""
    faults: list[str] = []
    engines: dict[str, Engine] = {}
    recipes: dict[str, dict[str, Any]] = {}
    rates = CalibratedRates()
    # Processes beside this one, and model calls on several threads, want cores of their own.
    alone = settings.workers == settings.threads == 1
    threads = search_threads(settings.concurrency, own_cores(settings.concurrency) if alone else ())
    for path in paths:
        name = path.resolve().name
        try:
            if name in engines:
                raise ConfigError(f"bundle {path}: its name {name!r} is taken, rename one of the folders")
            bundle = open_bundle(path)
            engines[name] = open_engine(name, bundle, settings, rates, threads)
            recipes[name] = bundle.manifest.recipe
        except FaultsError as error:
            faults += [f"{error.subject}: {fault}" for fault in error.faults]
        except OneSearchError as error:
            faults.append(str(error))
    if faults:
        raise BundleError("cannot serve", faults)
    split = read_split(settings.experiments, list(engines)) if settings.experiments else declared_split(recipes)
    return Deployment(list(engines.values()), split, rates)


def open_engine(
    name: str, bundle: Bundle, settings: Settings, rates: CalibratedRates, threads: ThreadPoolExecutor
) -> Engine:
    """An engine that searches a bundle on threads of this process, or on the inference server that the settings name.

    Raises BundleError for a bundle without graphs where this process needs them, ConfigError for a missing package.
    """
    decoder = _decoder(bundle, settings) if EMBEDDED in (settings.inference, settings.inference_fallback) else None
    if settings.inference == EMBEDDED:
        assert decoder is not None
        searcher = Searcher(bundle, decoder)
        runner: InferenceRunner = EmbeddedRunner(searcher, threads)
        check: Callable[[], list[str]] = partial(replay, searcher, bundle.examples, settings.precision)
    else:
        searcher, runner, check = _on_triton(name, bundle, settings, decoder)
    searcher.popularity = rates
    queries = dict.fromkeys(example.context.query for example in bundle.examples)
    return Engine(
        name=name,
        model_version=bundle.manifest.model_version,
        identifiers=f"{bundle.manifest.catalog_version}-{bundle.manifest.digest[:12]}",
        live=searcher.live,
        runner=runner,
        check=check,
        watched=decoder is None,
        examples=tuple(queries)[:EXAMPLE_QUERIES],
    )


def _decoder(bundle: Bundle, settings: Settings) -> Decoder:
    if bundle.graphs is None:
        raise BundleError(f"bundle {bundle.path}", [f"has no graphs; run: onesearch-export {bundle.path}"])
    if (precision := settings.precision) not in bundle.graph_stamp["parity"]:
        fault = f"was exported without {precision}; run: onesearch-export {bundle.path} --precision {precision}"
        raise BundleError(f"bundle {bundle.path}", [fault])
    return open_decoder(bundle.graphs, bundle.renderer.sids, bundle.renderer.bos, settings.threads, precision)


def _on_triton(
    name: str, bundle: Bundle, settings: Settings, fallback: Decoder | None
) -> tuple[Searcher, InferenceRunner, Callable[[], list[str]]]:
    """A searcher on the server, its runner and its check; with a fallback the server may be away."""
    try:
        from service.inference_triton import Probe, TritonModel, TritonRunner, TritonSearcher
    except ImportError as error:
        raise ConfigError(f"inference: {settings.inference!r} needs the extra onesearch[triton]") from error
    model = TritonModel(settings.inference, name, bundle.manifest.digest, settings.inference_timeout_ms / 1e3)
    searcher = TritonSearcher(bundle, model, fallback)
    golden = partial(replay, searcher, bundle.examples, settings.precision)
    check = Probe(searcher) if fallback is None else golden
    return searcher, TritonRunner(searcher, settings.concurrency), check
