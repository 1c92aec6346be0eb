"""What is served: the opened bundles and the variants that split the traffic between them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onesearch.bundle import Bundle, open_bundle
from onesearch.errors import BundleError, ConfigError, FaultsError, OneSearchError
from onesearch.live import LiveCatalog
from onesearch.runtime import OnnxDecoder
from onesearch.search import Searcher, SearchOptions, replay
from service.inference import EmbeddedRunner, InferenceRunner
from service.settings import Settings
from service.variants import Split, VariantOptions, declared_split, read_split

EXAMPLE_QUERIES = 8


@dataclass(frozen=True)
class Engine:
    """One open bundle with the runner that searches it. check replays its golden examples and returns faults."""

    name: str
    model_version: str
    live: LiveCatalog
    runner: InferenceRunner
    check: Callable[[], list[str]]
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One named way of answering."""

    name: str
    engine: Engine
    options: VariantOptions

    def search_options(self, limit: int, **more: Any) -> SearchOptions:
        """The search options of a request that this variant answers."""
        own = self.options
        return SearchOptions(limit=limit, width=own.width, score=own.score, keywords=own.keywords, **more)


class Deployment:
    """Engines and variants; immutable while the service runs."""

    def __init__(self, engines: Sequence[Engine], split: Split) -> None:
        by_name = {engine.name: engine for engine in engines}
        self.engines = tuple(engines)
        self.split = split
        self.variants: Mapping[str, Variant] = {
            name: Variant(name, by_name[str(options.bundle)], options) for name, options in split.variants.items()
        }


def open_deployment(paths: Sequence[Path], settings: Settings) -> Deployment:
    """Open every bundle and the variants. Raises BundleError that lists the faults of all of them."""
    faults: list[str] = []
    engines: dict[str, Engine] = {}
    recipes: dict[str, dict[str, Any]] = {}
    for path in paths:
        name = path.resolve().name
        try:
            if name in engines:
                raise ConfigError(f"bundle {path}: its name {name!r} is taken, rename one of the folders")
            bundle = open_bundle(path)
            engines[name] = open_engine(name, bundle, settings)
            recipes[name] = bundle.manifest.recipe
        except FaultsError as error:
            faults += [f"{error.subject}: {fault}" for fault in error.faults]
        except OneSearchError as error:
            faults.append(str(error))
    if faults:
        raise BundleError("cannot serve", faults)
    split = read_split(settings.variants, list(engines)) if settings.variants else declared_split(recipes)
    return Deployment(list(engines.values()), split)


def open_engine(name: str, bundle: Bundle, settings: Settings) -> Engine:
    """An engine that searches a bundle in this process. Raises BundleError for a bundle without graphs."""
    if bundle.graphs is None:
        raise BundleError(f"bundle {bundle.path}", [f"has no graphs; run: onesearch-export {bundle.path}"])
    renderer = bundle.renderer
    searcher = Searcher(bundle, OnnxDecoder(bundle.graphs, renderer.sids, renderer.bos, settings.threads))
    queries = dict.fromkeys(example.context.query for example in bundle.examples)
    return Engine(
        name=name,
        model_version=bundle.manifest.model_version,
        live=searcher.live,
        runner=EmbeddedRunner(searcher, settings.concurrency),
        check=lambda: replay(searcher, bundle.examples),
        examples=tuple(queries)[:EXAMPLE_QUERIES],
    )
