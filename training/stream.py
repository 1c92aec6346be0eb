"""`python -m training.stream BUNDLE --data DIR --out OUT`: a bundle that follows its log (spec §4.13).

The page views after the last one that the bundle has learned from are cut into windows of equal time; windows in which
nothing became known are passed over. For each in turn: counters, keyword rules and relevance rules are made again from
everything known by its end; new items get their SIDs by the frozen tokenizer, embedder and quantiser; the served model
goes on through the stages with page views of the window and old ones; and what comes out is published if the gate lets
it pass. Otherwise what was served stays, and the window teaches by replay alone. An order is known once `delay` has
passed since its page view, which then teaches a second time.

`OUT/0001`, … are the published bundles, `OUT/current` leads to the one to serve, and `OUT/ledger.jsonl` is the whole
state: one line per finished window, the first for the bundle itself. A run that was killed repeats the window that has
no line yet, from the stages in `OUT/work`.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import typer
from rich.console import Console

from onesearch.bundle import SCHEMA_VERSION, Bundle, HeldOut, Manifest, open_bundle, open_parts, read_held_out
from onesearch.command import run
from onesearch.errors import BundleError, ConfigError, DecodeError, DivergedError
from onesearch.model import OneSearchModel, open_model
from onesearch.sid import Codes
from training.grades import read_grades
from training.keywords import mine_keywords
from training.ledger import CURRENT, LEDGER, Row, alone, read_ledger, write_ledger
from training.metrics import Estimate, paired
from training.microbatch import Log, Mix, StreamConfig, mix
from training.package import update_identifiers, write_bundle
from training.pipeline import UNTIL, Work, fingerprint
from training.probe import Numbers, as_json, measure
from training.recipe import DataConfig, build, read_toml
from training.samples import Sources
from training.sessions import PageView, click_rates
from training.subject import sample
from training.tables import Tables, load_tables
from training.train import train

_console = Console(stderr=True)


@dataclass(frozen=True)
class Stream:
    """One bundle, its log and the folder where its versions go."""

    config: StreamConfig
    tables: Tables
    log: Log
    probe: Sequence[HeldOut]
    data: Path
    out: Path
    inputs: Mapping[str, Any]

    def first(self, bundle: Bundle) -> Row:
        """The ledger's first line: the bundle as it is."""
        model, manifest = open_model(bundle.path), bundle.manifest
        numbers = self._measure(bundle, model, model)
        train = [view.time for view in self.log.views if view.split == "train"]
        until = int(manifest.metrics.get(UNTIL, max(train, default=0)))  # older bundles do not say
        versions = (str(bundle.path), manifest.model_version, manifest.catalog_version)
        return Row(0, until, until, True, "", *versions, numbers=as_json(numbers), found=numbers.found)

    def window(self, rows: Sequence[Row], start: int) -> Row:
        """Do the window after `start`, the next of the ledger; its bundle is in place if it was published."""
        last, number = rows[-1], len(rows)
        end = start + self.config.window
        served = open_bundle(self.out / last.bundle, graphs=False)
        work = Work(self.out / "work")
        before = {"served": (last.model_version, last.catalog_version), "window": (number, start, end)}
        inputs = {**self.inputs, **before}
        known = self.log.known(end, self.config.delay)
        items = self._items(served, end)
        parts = self._identifiers(served, items, known, work.folder("identifiers", inputs))
        live = dict(zip(parts.catalog.item_ids.tolist(), parts.catalog.sids, strict=True))
        chosen = mix(known, start, self.config, live, self.config.seed + number)
        row = replace(
            last,
            window=number,
            start=start,
            end=end,
            views=sum(view.time > start for view in known),
            fresh=len(chosen.fresh),
            replayed=len(chosen.replayed),
            new_items=int((~items["item_id"].is_in(served.catalog.item_ids)).sum()),
            published=False,
            reason="",
            loss={},
            numbers=None,
            gain=None,
            found=(),
        )
        model, loss = open_model(served.path), dict[str, dict[str, float]]()
        try:
            if chosen.fresh:
                sources = self._sources(parts, items, live, known, chosen, number)
                model, loss = train(self.config.recipe(number), sources, work.folder, inputs, model)
            numbers = self._measure(parts, model, open_model(served.path))
        except (DivergedError, DecodeError) as error:
            return replace(row, reason=str(error))
        change = paired(np.subtract(numbers.found, rows[0].found)[None], self.config.seed)
        gain = (change.value, change.low or 0.0, change.high or 0.0)
        row = replace(row, loss=loss, numbers=as_json(numbers), gain=gain, found=numbers.found)
        reason = self.config.gate.refusal(numbers, [r.numbers for r in rows if r.published and r.numbers])
        if reason:
            return replace(row, reason=reason)
        manifest = self._publish(served, parts, model, row)
        return replace(
            row,
            published=True,
            bundle=f"{number:04d}",
            model_version=manifest.model_version,
            catalog_version=manifest.catalog_version,
        )

    def _items(self, served: Bundle, end: int) -> pl.DataFrame:
        """The catalog at a time: items of the tables, as they are now, that are served or published by then."""
        published = pl.col("published_at").is_null() | (pl.col("published_at") <= end)
        return self.tables.items.filter(published | pl.col("item_id").is_in(served.catalog.item_ids))

    def _identifiers(self, served: Bundle, items: pl.DataFrame, known: Sequence[PageView], folder: Path) -> Bundle:
        """The window's catalog, trie, click rates and keyword rules beside the frozen parts, opened."""
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            data = build(DataConfig, served.manifest.recipe.get("data", {}), "data")
            keywords = mine_keywords(items, known, data.min_keyword_items)
            update_identifiers(partial, served, items, click_rates(known), keywords)
            partial.rename(folder)
        return open_parts(folder, Manifest(SCHEMA_VERSION, "", "", "", "", {}, {}, {}))

    def _sources(
        self,
        parts: Bundle,
        items: pl.DataFrame,
        live: Mapping[int, Codes],
        known: Sequence[PageView],
        chosen: Mix,
        number: int,
    ) -> Sources:
        learn = chosen.fresh | chosen.replayed
        queries = list(dict.fromkeys(known[i].context.query for i in sorted(learn)))
        return Sources(
            renderer=parts.renderer,
            encoder=parts.encoder,
            items=items,
            views=known,
            keywords=(),  # preferences and rollouts read prompts without keywords
            item_sids=live,
            query_sids=dict(zip(queries, parts.encoder.query_sids(queries), strict=True)),
            popularity=click_rates(known),
            trie=parts.trie,
            judged=self.tables.relevance,
            anonymous_share=0.0,
            seed=self.config.seed + number,
            learn=learn,
        )

    def _measure(self, bundle: Bundle, model: OneSearchModel, served: OneSearchModel) -> Numbers:
        grader = read_grades(self.data, self.tables.relevance, bundle.catalog)
        return measure(bundle, model, served, self.probe, grader, self.config.seed)

    def _publish(self, served: Bundle, parts: Bundle, model: OneSearchModel, row: Row) -> Manifest:
        """Seal the window's bundle. What a killed run left under its name was in no ledger, so nobody serves it."""
        target = self.out / f"{row.window:04d}"
        shutil.rmtree(target, ignore_errors=True)
        contexts, held_out = [example.context for example in served.examples], read_held_out(served.path)
        metrics = {**served.manifest.metrics, UNTIL: row.end, "stream": {**(row.numbers or {}), "loss": row.loss}}
        return write_bundle(parts.path, model, contexts, held_out, target, served.manifest.recipe, metrics)


def follow(config: StreamConfig, bundle: Path, data: Path, out: Path, windows: int | None = None) -> list[Row]:
    """Do every whole window that the tables hold, at most `windows`; returns the ledger. Raises OneSearchError.

    A ledger that began with another bundle is refused, and a folder in which another process is at work.
    """
    torch.set_num_threads(config.threads)
    tables, first = load_tables(data), open_bundle(bundle.resolve(), graphs=False)
    held_out = read_held_out(first.path)
    if not held_out:
        raise BundleError(f"bundle {bundle}", ["holds no held-out searches, which are the probe of the gate"])
    probe = sample(held_out, config.probe, config.seed)
    inputs = {"tables": fingerprint(data), "config": asdict(config)}
    stream = Stream(config, tables, Log.of(tables, held_out), probe, data, out, inputs)
    with alone(out):
        rows = read_ledger(out) or [stream.first(first)]
        if (rows[0].model_version, rows[0].catalog_version) != _versions(first):
            raise ConfigError(f"{out / LEDGER}: began with model {rows[0].model_version}, not with {bundle}")
        write_ledger(out, rows)
        for _ in count() if windows is None else range(windows):
            start = stream.log.begin(rows[-1].end, config)
            if start is None:
                break
            rows.append(stream.window(rows, start))
            write_ledger(out, rows)
            shutil.rmtree(out / "work", ignore_errors=True)
            _console.print(rows[-1].line(), markup=False, highlight=False, soft_wrap=True)
    return rows


def _versions(bundle: Bundle) -> tuple[str, str]:
    return bundle.manifest.model_version, bundle.manifest.catalog_version


def main() -> None:
    """Console entry point."""
    run(_main)


def _main(
    bundle: Annotated[Path, typer.Argument(help="the bundle to begin with")],
    data: Annotated[Path, typer.Option(help="folder with the tables, which may grow between runs")],
    out: Annotated[Path, typer.Option(help="folder for the published bundles, `current` and the ledger")],
    recipe: Annotated[Path | None, typer.Option(help="a TOML file like recipes/stream.toml")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="do at most so many windows")] = None,
) -> None:
    """Let a bundle follow its log: learn window by window, publish what passes the gate."""
    started = time.monotonic()
    try:
        config: StreamConfig = read_toml(StreamConfig, recipe) if recipe else StreamConfig()
        before = len(read_ledger(out) or [None])
        rows = follow(config, bundle, data, out, windows)
    except KeyboardInterrupt as error:
        _console.print("stream: interrupted; run the same command again to continue")
        raise typer.Exit(130) from error
    done, seconds = rows[before:], time.monotonic() - started
    served = next(row for row in reversed(rows) if row.published)
    gain = Estimate(*(served.gain or (0.0, 0.0, 0.0)))
    _console.print(
        f"{len(done)} windows, {sum(row.published for row in done)} published; {out / CURRENT} is model "
        f"{served.model_version}: HR@10 on the probe {(served.numbers or {}).get('hr'):.3f}, since the first "
        f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]; {seconds:.0f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
