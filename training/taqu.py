"""`python -m training.taqu --data DIR --out FILE`: the three keyword steps for every page view of a log (spec §4.6).

Makes the keyword file of a recipe (`[data] keywords = "file"`), with a language model at an OpenAI-compatible endpoint
or, without one, by the rules of a bundle or of the log itself. Two rounds: steps 1 and 2 once per distinct query,
then step 3 once per distinct user and query for serving, and again with the outcome for page views of the training
split (spec §4.6.4). Every answer is kept in `FILE.answers` under a digest of what was asked, so a run that was
stopped or killed goes on where it was, and questions that failed are asked again by the next run.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol

import typer

from onesearch.command import run
from onesearch.context import MAX_RECENT_ITEMS
from onesearch.errors import ConfigError, ProviderError
from onesearch.keywords import KeywordRules, load_keywords
from onesearch.llm import LlmClient, LlmConfig, Usage
from onesearch.progress import Meter
from onesearch.taqu import MAX_PERSONAL, KeywordProvider, LlmProvider, RuleProvider, UserNotes, valid
from onesearch.taqu_prompts import SYSTEM, Language, analysis, calibration, extraction
from onesearch.text import normalise
from training.answers import Answers, question
from training.bootstrap import with_queries
from training.keywords import mine_keywords
from training.page_keywords import Keywords, write_keywords
from training.recipe import DataConfig, Recipe, load_recipe
from training.sessions import PageView, page_views
from training.tables import Tables, load_tables

AT_ONCE = 8
HOPELESS = 25  # failures in a row after which a run ends: the endpoint is away, not one answer unlucky
INCOMPLETE, INTERRUPTED = 1, 130

Answer = tuple[str, ...]
Ask = Callable[[], Awaitable[Answer]]


class Teacher(KeywordProvider, Protocol):
    """A provider whose third step may also be told what the page view led to."""

    async def personal(
        self, query: str, candidates: Sequence[str], user: UserNotes, outcome: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """outcome: titles of the clicked items, empty for keywords that serving could have made."""
        ...


class RuleTeacher(RuleProvider):
    """The rules; for the teacher what the clicked items are (their Entity phrases) comes first."""

    def __init__(self, rules: KeywordRules) -> None:
        super().__init__(rules)
        self._phrases = rules

    async def personal(
        self, query: str, candidates: Sequence[str], user: UserNotes, outcome: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """See `Teacher.personal`."""
        served = await super().personal(query, candidates, user)
        found = [phrase for title in outcome for phrase, _ in self._phrases.spans(normalise(title))]
        chosen = [phrase for phrase in found if self._phrases.types[phrase] == "Entity"]
        return valid([*chosen, *served], query, MAX_PERSONAL)


@dataclass
class Outcome:
    """How a run went. missing: page views whose keywords are not complete."""

    asked: int = 0
    known: int = 0
    failed: int = 0
    missing: int = 0


class Pipeline:
    """Makes the keywords of page views. who: names the provider with all that decides its answers."""

    def __init__(
        self, provider: Teacher, who: str, titles: Mapping[int, str], answers: Answers, usage: Usage
    ) -> None:
        self._provider, self._who, self._titles = provider, who, titles
        self._answers, self._usage = answers, usage
        self.outcome = Outcome()

    async def run(self, views: Sequence[PageView]) -> dict[int, Keywords]:
        """Session id → keywords, without the page views for which a question failed.

        Raises ProviderError after HOPELESS failures in a row.
        """
        queries = dict.fromkeys(view.context.query for view in views)
        asked = ((self._query_name(query), partial(self._provider.keywords, query)) for query in queries)
        await self._round("queries", asked, len(queries))
        ready = [view for view in views if self._answers.get(self._query_name(view.context.query)) is not None]
        await self._round("users", (job for view in ready for job in self._personal_jobs(view)), 2 * len(ready))
        made = {view.session_id: keywords for view in ready if (keywords := self._made(view)) is not None}
        self.outcome.missing = len(views) - len(made)
        return made

    def _query_name(self, query: str) -> str:
        return question(self._who, "query", query)

    def _personal_name(self, view: PageView, outcome: Sequence[str]) -> str:
        notes = astuple(self._notes(view))
        return question(self._who, "personal", view.context.query, self._candidates(view), notes, outcome)

    def _personal_jobs(self, view: PageView) -> Iterator[tuple[str, Ask]]:
        """Step 3 without the outcome, and with it where training will use it."""
        query, candidates, notes = view.context.query, self._candidates(view), self._notes(view)
        for outcome in ((), self._outcome(view)):
            ask = partial(self._provider.personal, query, candidates, notes, outcome)
            yield self._personal_name(view, outcome), ask

    def _made(self, view: PageView) -> Keywords | None:
        names = (self._personal_name(view, self._outcome(view)), self._personal_name(view, ()))
        train, serve = map(self._answers.get, names)
        if train is None or serve is None:
            return None
        return Keywords(self._candidates(view), train, serve)

    def _candidates(self, view: PageView) -> Answer:
        return self._answers.get(self._query_name(view.context.query)) or ()

    def _notes(self, view: PageView) -> UserNotes:
        """What was known before the page view."""
        context = view.context
        return UserNotes(context.profile, context.recent_queries, self._named(context.recent_items))

    def _outcome(self, view: PageView) -> Answer:
        return self._named(view.clicked) if view.split == "train" else ()

    def _named(self, items: Iterable[int]) -> Answer:
        return tuple(self._titles[item] for item in items if item in self._titles)[-MAX_RECENT_ITEMS:]

    async def _round(self, name: str, jobs: Iterable[tuple[str, Ask]], most: int) -> None:
        """Ask every question that has no answer, AT_ONCE together; each question once."""
        pending, seen, in_a_row = iter(jobs), set[str](), 0
        with Meter(name, most) as meter:

            async def work() -> None:
                nonlocal in_a_row
                for key, ask in pending:
                    if key in seen or self._answers.get(key) is not None:
                        self.outcome.known += key not in seen
                    else:
                        seen.add(key)
                        self.outcome.asked += 1
                        try:
                            self._answers.add(key, await ask())
                            in_a_row = 0
                        except ProviderError as error:
                            self.outcome.failed += 1
                            in_a_row += 1
                            if in_a_row >= HOPELESS:
                                raise ProviderError(f"{in_a_row} failures in a row, the last: {error}") from error
                    seen.add(key)
                    meter.advance(note=self._note())

            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(work())

    def _note(self) -> str:
        failed = f", {self.outcome.failed} failed" if self.outcome.failed else ""
        return f"cost {self._usage.cost:.4f}{failed}"


def llm_identity(model: str, language: Language) -> str:
    """Names a model with our prompts: other wording asks other questions."""
    empty: tuple[str, ...] = ()
    templates = [calibration("", empty, "", empty, empty, told, language) for told in (empty, ("",))]
    return question(model, SYSTEM[language], analysis("", language), extraction("", "", language), *templates)


def rules_of(bundle: Path | None, tables: Tables, views: Sequence[PageView], min_items: int) -> KeywordRules:
    """The rules of a bundle, else rules mined from the catalog and the training page views."""
    if bundle is not None:
        return load_keywords(bundle / "keywords.json")
    return mine_keywords(tables.items, views, min_items)


async def _make(pipeline: Pipeline, views: Sequence[PageView], client: LlmClient | None) -> dict[int, Keywords]:
    try:
        return await pipeline.run(views)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # of workers that failed together the first
    finally:
        if client is not None:
            await client.close()


def make_keywords(
    data: Path,
    out: Path,
    bundle: Path | None = None,
    recipe: Recipe | None = None,
    config: LlmConfig | None = None,
    language: Language = "en",
) -> tuple[Outcome, Usage]:
    """Write the keyword file of the tables in `data`, by a language model if there is a config, else by rules.

    Tables without logs need the recipe that will use the file: it decides the pseudo-queries. Raises OneSearchError;
    what was answered until then is kept.
    """
    made_up = DataConfig() if recipe is None else recipe.data
    seed = 1 if recipe is None else recipe.seed
    tables = with_queries(load_tables(data), made_up.bootstrap, seed, made_up.pseudo_queries)
    views = page_views(tables)
    titles = dict(tables.items.select("item_id", "item_title").iter_rows())
    client = None if config is None else LlmClient(config)
    if config is None or client is None:
        rules, usage = rules_of(bundle, tables, views, made_up.min_keyword_items), Usage()
        provider: Teacher = RuleTeacher(rules)
        who = question("rules", rules.to_json())
    else:
        provider, usage, who = LlmProvider(client, language), client.usage, llm_identity(config.model, language)
    with Answers(out.with_name(f"{out.name}.answers")) as answers:
        pipeline = Pipeline(provider, who, titles, answers, usage)
        made = asyncio.run(_make(pipeline, views, client))
        write_keywords(out, views, made)
    return pipeline.outcome, usage


def _command(
    data: Annotated[Path, typer.Option(help="folder with the tables")],
    out: Annotated[Path, typer.Option(help="the keyword file to write; its answers are kept beside it")],
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible endpoint such as http://host:8000/v1")] = "",
    model: Annotated[str, typer.Option(help="model to ask for")] = "default",
    key: Annotated[str, typer.Option(envvar="ONESEARCH_LLM_KEY", help="key of the endpoint")] = "none",
    language: Annotated[Language, typer.Option(help="language of the prompts")] = "en",
    bundle: Annotated[Path | None, typer.Option(help="without an endpoint: use this bundle's rules")] = None,
    recipe: Annotated[Path | None, typer.Option(help="the recipe that will use the file")] = None,
    timeout_seconds: Annotated[float, typer.Option(min=0.01, help="longest wait for one try")] = 30.0,
    retries: Annotated[int, typer.Option(min=0, help="further tries of a question")] = 2,
    requests_per_minute: Annotated[float, typer.Option(min=0, help="pace, 0: as fast as answered")] = 0.0,
    prompt_price: Annotated[float, typer.Option(min=0, help="of a million prompt tokens")] = 0.0,
    completion_price: Annotated[float, typer.Option(min=0, help="of a million completion tokens")] = 0.0,
) -> None:
    """Make the keywords of every page view; exit status 1 when some failed: run it again to ask these again."""
    try:
        if endpoint and bundle is not None:
            raise ConfigError("expected either --endpoint or --bundle")
        config = LlmConfig(
            url=endpoint,
            model=model,
            key=key,
            timeout_seconds=timeout_seconds,
            retries=retries,
            requests_per_minute=requests_per_minute,
            prompt_price=prompt_price,
            completion_price=completion_price,
        )
        plan = None if recipe is None else load_recipe(recipe)
        outcome, usage = make_keywords(data, out, bundle, plan, config if endpoint else None, language)
    except KeyboardInterrupt as error:
        typer.echo("taqu: interrupted; run the same command again to continue", err=True)
        raise typer.Exit(INTERRUPTED) from error
    tokens = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, cost {usage.cost:.4f}"
    typer.echo(
        f"{out}: {outcome.asked} questions asked, {outcome.failed} failed, {outcome.known} known before; "
        f"{outcome.missing} page views incomplete; {usage.answers} answers, {tokens}"
    )
    if outcome.missing:
        typer.echo("taqu: run the same command again to ask what failed", err=True)
        raise typer.Exit(INCOMPLETE)


def main() -> None:
    """Console entry point."""
    run(_command)


if __name__ == "__main__":
    main()
