"""Keywords of a whole log: nothing is lost when the endpoint misbehaves or the process is killed, and what serving
would not know stays out of its keywords."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from command_line import invoke
from test_llm import Endpoint, completion
from test_sessions import row, tables

from onesearch.command import REFUSED
from onesearch.errors import ConfigError, DataError
from onesearch.keywords import KeywordRules
from onesearch.llm import Usage
from training import taqu
from training.answers import Answers
from training.page_keywords import Keywords, file_keywords, write_keywords
from training.recipe import DataConfig
from training.sessions import PageView, page_views
from training.tables import load_tables, write_tables

QUERIES = ("red shoes", "blue bag", "lamp", "towel", "mug", "rug")
ROWS = [
    row(1 + i % 2, 10 * (1 + i), query, [1 + i], [1 + i] if i % 2 else [])
    | {"split": "test" if i == 5 else "train"}
    for i, query in enumerate(QUERIES)
]
QUESTIONS = 6 + 6 + 5  # queries, users for serving, users with the outcome: the test page view has none of these


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    opened = Endpoint()
    yield opened
    opened.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_tables(tables(ROWS), tmp_path / "data")
    return tmp_path / "data"


def command(data: Path, out: Path, endpoint: Endpoint, *more: str) -> list[str]:
    options = ("--endpoint", endpoint.url, "--retries", "0", *more)
    return ["--data", str(data), "--out", str(out), *options]


def run(*arguments: str) -> tuple[int, str]:
    result = invoke(taqu.main, *arguments)
    return result.exit_code, result.output


def kept(out: Path) -> list[str]:
    path = out.with_name(f"{out.name}.answers")
    return [orjson.loads(line)["question"] for line in path.read_bytes().splitlines()] if path.exists() else []


def test_every_page_view_gets_its_three_lists_and_a_second_run_asks_nothing(
    data: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    out = tmp_path / "k.jsonl"
    code, shown = run(*command(data, out, endpoint, "--prompt-price", "2", "--completion-price", "10"))
    assert code == 0
    assert f"{QUESTIONS} questions asked, 0 failed" in shown
    assert len(endpoint.seen) == 6 * 2 + 11  # a query takes two requests
    assert f"cost {23 * (100 * 2 + 10 * 10) / 1e6:.4f}" in shown
    views = page_views(load_tables(data))
    assert file_keywords(out)(views) == [Keywords(("shoes",), ("shoes",), ("shoes",))] * 6
    before = out.read_bytes()
    assert run(*command(data, out, endpoint))[0] == 0
    assert len(endpoint.seen) == 23 and out.read_bytes() == before
    run(*command(data, out, endpoint, "--model", "another"))
    assert len(endpoint.seen) == 46  # another model's answers are other answers


def test_failures_are_counted_and_asked_again_by_the_next_run(
    data: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    out = tmp_path / "k.jsonl"
    endpoint.script = [500, b"not json", completion(None), completion("x"), completion("!!!"), 1.5, 429, b"{}"]
    code, shown = run(*command(data, out, endpoint, "--timeout-seconds", "1"))
    assert code == taqu.INCOMPLETE
    failed = int(shown.split(" failed")[0].rsplit(" ", 1)[1])
    assert failed >= 5 and "ask what failed" in shown
    complete = len(out.read_bytes().splitlines())
    assert f"{6 - complete} page views incomplete" in shown and complete < 6
    views = page_views(load_tables(data))
    assert file_keywords(out)(views).count(Keywords((), (), ())) == 6 - complete
    known = kept(out)
    code, shown = run(*command(data, out, endpoint))
    assert code == 0 and f"{QUESTIONS - len(known)} questions asked, 0 failed" in shown
    assert kept(out)[: len(known)] == known and len(set(kept(out))) == len(kept(out)) == QUESTIONS
    assert len(out.read_bytes().splitlines()) == 6


def test_a_run_ends_when_the_endpoint_is_away(
    data: Path, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taqu, "HOPELESS", 3)
    endpoint.script = [500] * 50
    code, shown = run(*command(data, tmp_path / "k.jsonl", endpoint))
    assert code == REFUSED and "3 failures in a row" in shown
    assert len(endpoint.seen) < 20 and not (tmp_path / "k.jsonl").exists()


def test_a_killed_run_loses_no_answer(data: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    out = tmp_path / "k.jsonl"
    endpoint.script = [0.05] * 60
    process = subprocess.Popen(
        [sys.executable, "-m", "training.taqu", *command(data, out, endpoint, "--requests-per-minute", "1800")],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(kept(out)) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not out.exists()
    before = kept(out)
    assert 4 <= len(before) < QUESTIONS
    with out.with_name("k.jsonl.answers").open("ab") as file:
        file.write(b'{"question":"half a li')  # what a power cut leaves
    endpoint.script, asked = [], len(endpoint.seen)
    code, shown = run(*command(data, out, endpoint))
    assert code == 0 and f"{QUESTIONS - len(before)} questions asked, 0 failed" in shown
    assert kept(out)[: len(before)] == before and len(kept(out)) == QUESTIONS
    assert len(endpoint.seen) - asked < 23
    assert len(file_keywords(out)(page_views(load_tables(data)))) == 6


def test_requests_are_paced(data: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    run(*command(data, tmp_path / "k.jsonl", endpoint, "--requests-per-minute", "3000"))
    assert endpoint.times[-1] - endpoint.times[0] > 0.9 * 22 * 0.02


RULES = KeywordRules({"shoes": "Entity", "bag": "Entity", "rug": "Entity", "red": "Color"}, {"lamp": ("bag",)})
TITLES = {1: "red shoes", 2: "blue shoes", 30: "white rug", 7: "red bag"}


def by_rules(views: list[PageView], path: Path) -> list[Keywords]:
    with Answers(path) as answers:
        pipeline = taqu.Pipeline(taqu.RuleTeacher(RULES), "rules", TITLES, answers, Usage())
        made = asyncio.run(pipeline.run(views))
    return [made[view.session_id] for view in views]


def test_the_outcome_reaches_the_teachers_keywords_only(tmp_path: Path) -> None:
    views = page_views(tables(ROWS))
    changed = [replace(view, clicked=(30,), ordered=(30,)) for view in views]
    before, after = by_rules(views, tmp_path / "a"), by_rules(changed, tmp_path / "a")
    assert [(k.query, k.serve) for k in before] == [(k.query, k.serve) for k in after]
    trained = [k for k, view in zip(after, changed, strict=True) if view.split == "train"]
    assert all(k.train[0] == "rug" for k in trained) and len(trained) == 5
    assert not any("rug" in k.train for k in before if k.query != ("rug",))
    assert after[-1].train == after[-1].serve  # a page view that nobody trains on


def test_a_language_model_is_told_the_outcome_for_the_teacher_only(
    data: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    run(*command(data, tmp_path / "k.jsonl", endpoint))
    prompts = [seen["messages"][1]["content"] for seen in endpoint.seen]
    assert sum("chosen in this search" in prompt for prompt in prompts) == 5
    first = [p for p in prompts if "<query>red shoes</query>" in p and "<candidates>" in p]
    assert len(first) == 2 and sum("chosen in this search: red shoes" in p for p in first) == 1


def test_without_an_endpoint_the_rules_of_the_log_are_used(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "k.jsonl"
    code, shown = run("--data", str(data), "--out", str(out))
    assert code == 0 and "0 failed" in shown
    found = file_keywords(out)(page_views(load_tables(data)))
    assert any("shoes" in k.query for k in found)
    code, shown = run("--data", str(data), "--out", str(out), "--endpoint", "http://x/v1", "--bundle", "b")
    assert code == REFUSED and "either --endpoint or --bundle" in shown


def test_a_foreign_or_damaged_file_is_refused(tmp_path: Path) -> None:
    views, path = page_views(tables(ROWS)), tmp_path / "k.jsonl"
    write_keywords(path, views, {0: Keywords(("a",), ("b",), ("c",))})
    assert file_keywords(path)(views)[:2] == [Keywords(("a",), ("b",), ("c",)), Keywords((), (), ())]
    other = [replace(views[0], context=replace(views[0].context, query="other")), *views[1:]]
    with pytest.raises(DataError, match="was made from other tables: session 0 asked 'other'"):
        file_keywords(path)(other)
    path.write_bytes(path.read_bytes() + b'{"session_id": 3}\n[]\n')
    with pytest.raises(DataError, match="2 fault") as caught:
        file_keywords(path)
    assert "line 2" in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        file_keywords(tmp_path / "missing.jsonl")
    with pytest.raises(ConfigError, match=r"data\.keyword_file: '', expected a file exactly when"):
        DataConfig(keywords="file")


def test_answers_belong_to_one_process_and_to_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with Answers(path) as answers:
        answers.add("q", ("a", "b"))
        with pytest.raises(ConfigError, match="in use"):
            Answers(path)
    with Answers(path) as answers:
        assert answers.get("q") == ("a", "b") and answers.get("other") is None
    path.write_bytes(b"something else\n")
    with pytest.raises(DataError, match="line 1"):
        Answers(path)
