"""`onesearch-keywords BUNDLE`: the near-line worker that makes the keywords that searches missed.

It borrows jobs from the queue, asks its provider (the bundle's rules, or a language model if one is set), and stores
entries. A failure is tried again after a growing pause and given up after MAX_ATTEMPTS; a worker that dies gives its
jobs back when their lease ends, and a job that its workers died of is given up, too. Any number of workers may run.
"""

import asyncio
import logging
import logging.config
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import orjson
import typer

from onesearch.bundle import Bundle, open_bundle
from onesearch.catalog import Catalog
from onesearch.command import run
from onesearch.errors import ProviderError
from onesearch.llm import LlmClient, LlmConfig, Usage
from onesearch.taqu import KeywordProvider, LlmProvider, RuleProvider, UserNotes
from service.keywords import DAY, NEGATIVE_SECONDS, PERSONAL_SECONDS, Claim, Entry, Job, entry_key
from service.settings import Settings, load_settings
from service.state import StateUnavailable, UserState
from service.store import Store, open_store
from service.telemetry import WorkerMetrics, log_config

MAX_ATTEMPTS = 5
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 300.0
LEASE_SECONDS = 300.0
IDLE_SECONDS = 0.5
AT_ONCE = 8
RECENT_CLICKS = 20
logger = logging.getLogger("onesearch.keywords")


class Worker:
    """Turns jobs into entries. titles: the titles of item ids that are known."""

    def __init__(
        self,
        store: Store,
        provider: KeywordProvider,
        titles: Callable[[Sequence[int]], tuple[str, ...]],
        ttl_seconds: float,
        metrics: WorkerMetrics,
    ) -> None:
        self._store = store
        self._provider = provider
        self._titles = titles
        self._ttl = ttl_seconds
        self._metrics = metrics

    async def run(self, stop: asyncio.Event) -> None:
        """Work until told to stop; jobs that were begun are finished. A store that is away is waited for."""
        while not stop.is_set():
            try:
                done = await self.step()
                self._metrics.queue(*await self._store.keywords.queue(time.time()))
            except StateUnavailable:
                logger.warning("store is away")
                done = 0
            if not done:
                try:
                    await asyncio.wait_for(stop.wait(), IDLE_SECONDS)
                except TimeoutError:
                    continue

    async def step(self) -> int:
        """Borrow what is due and settle it; returns how many jobs. Raises StateUnavailable."""
        claims = await self._store.keywords.claim(AT_ONCE, LEASE_SECONDS, time.time())
        for personal in (False, True):  # a user's keywords start from those of the query, so these come first
            part = [self._settle(claim) for claim in claims if (claim.job.user is not None) == personal]
            for outcome in await asyncio.gather(*part, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
        return len(claims)

    async def _settle(self, claim: Claim) -> None:
        job, started = claim.job, time.monotonic()
        if claim.attempts > MAX_ATTEMPTS:  # its workers died of it, or it would be settled
            await self._give_up(claim, {"error": "abandoned", "attempts": claim.attempts})
            return
        try:
            entries = await self._entries(job)
        except StateUnavailable:
            raise
        except Exception as error:  # whatever a provider does, the queue must go on
            await self._failed(claim, error)
            return
        await self._store.keywords.finish(job.key, entries, time.time())
        self._metrics.done(time.monotonic() - started, time.time() - job.at)

    async def _failed(self, claim: Claim, error: Exception) -> None:
        fields: dict[str, object] = {"error": type(error).__name__, "attempts": claim.attempts}
        if isinstance(error, ProviderError):
            fields["reason"] = str(error)
        if claim.attempts >= MAX_ATTEMPTS:
            await self._give_up(claim, fields)
            return
        logger.warning("keywords failed", extra={"fields": fields | {"given_up": False}})
        self._metrics.failed(given_up=False)
        pause = min(FIRST_PAUSE * 2 ** (claim.attempts - 1), LONGEST_PAUSE)
        await self._store.keywords.retry(claim.job.key, time.time() + pause)

    async def _give_up(self, claim: Claim, fields: dict[str, object]) -> None:
        """Make a dead letter of a job."""
        logger.warning("keywords failed", extra={"fields": fields | {"given_up": True}})
        self._metrics.failed(given_up=True)
        await self._store.keywords.bury(claim.job.key, time.time())

    async def _entries(self, job: Job) -> dict[str, Entry]:
        key = entry_key(job.query)
        known = (await self._store.keywords.lookup([key], time.time())).get(key)
        entries: dict[str, Entry] = {}
        if known is None or known.fresh_until <= time.time():
            known = _entry(await self._provider.keywords(job.query), self._ttl)
            entries[key] = known
        if job.user is not None:
            # Only what the user had done when they asked: the outcome of that search stays out (spec §4.6.4).
            state = (await self._store.users.read(job.user, time.time())).before(job.at)
            found = await self._provider.personal(job.query, known.keywords, self._notes(state))
            entries[job.key] = _entry(found, PERSONAL_SECONDS)
        return entries

    def _notes(self, state: UserState) -> UserNotes:
        clicked = [int(entry.value) for entry in state.clicks[-RECENT_CLICKS:]]
        context = state.context("")
        return UserNotes(state.profile, context.recent_queries, self._titles(clicked))


def _entry(keywords: tuple[str, ...], ttl: float) -> Entry:
    return Entry(keywords, time.time() + (ttl if keywords else min(ttl, NEGATIVE_SECONDS)))


def titles_of(catalog: Catalog) -> Callable[[Sequence[int]], tuple[str, ...]]:
    """Looks up titles in a bundle's catalog."""

    def titles(items: Sequence[int]) -> tuple[str, ...]:
        return tuple(str(orjson.loads(catalog.item_json(row))["title"]) for row in catalog.rows_of(items).tolist())

    return titles


def open_provider(settings: Settings, bundle: Bundle) -> tuple[KeywordProvider, Usage]:
    """The provider that the settings name, and what it spends. Raises ConfigError."""
    if settings.llm_url is None:
        return RuleProvider(bundle.keywords), Usage()
    config = LlmConfig(
        url=settings.llm_url,
        model=settings.llm_model,
        key=settings.llm_key.get_secret_value(),
        timeout_seconds=settings.llm_timeout_seconds,
        requests_per_minute=settings.llm_requests_per_minute,
        prompt_price=settings.llm_prompt_price,
        completion_price=settings.llm_completion_price,
    )
    client = LlmClient(config)
    return LlmProvider(client, settings.llm_language), client.usage


async def _work(settings: Settings, bundle: Bundle, port: int) -> None:
    provider, usage = open_provider(settings, bundle)
    metrics = WorkerMetrics(usage)
    store = open_store(settings)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    closes = metrics.serve(port) if port else None
    worker = Worker(store, provider, titles_of(bundle.catalog), settings.keyword_ttl_days * DAY, metrics)
    try:
        await worker.run(stop)
    finally:
        await store.close()
        if isinstance(provider, LlmProvider):
            await provider.client.close()
        if closes is not None:
            closes()


def keywords(
    bundle: Annotated[Path, typer.Argument(help="The bundle whose rules and titles are used.")],
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of /metrics, 0 for none.")] = 0,
) -> None:
    """Make the keywords that searches missed; settings as for onesearch-serve."""
    settings = load_settings()
    logging.config.dictConfig(log_config(settings.log_level))
    opened = open_bundle(bundle, graphs=False)
    typer.echo("onesearch-keywords works", err=True)
    asyncio.run(_work(settings, opened, metrics_port))


def main() -> None:
    """The console script."""
    run(keywords)
