"""Answers that cost something to get, kept by what was asked: a JSONL file that only grows (spec §4.6.5).

A line is written before the next question is asked, so a process that is killed loses no answer; the disk is told
once a second, so a machine that loses power loses at most the last second. A last line that was cut is dropped.
"""

import fcntl
import hashlib
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from onesearch.errors import ConfigError, DataError

_SYNC_SECONDS = 1.0


def question(*parts: Any) -> str:
    """The name of a question: a digest of everything that decides its answer."""
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()[:32]


class Answers:
    """The answers of one file, for one process at a time; use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises DataError when the file holds something else, ConfigError when another process has it open."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ConfigError(f"{path}: is in use by another process") from error
        self._known: dict[str, tuple[str, ...]] = {}
        self._synced = time.monotonic()
        try:
            self._read(path)
        except DataError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, name: str) -> tuple[str, ...] | None:
        """The answer to a question, None if there is none yet."""
        return self._known.get(name)

    def add(self, name: str, answer: tuple[str, ...]) -> None:
        """Keep an answer."""
        self._file.write(orjson.dumps({"question": name, "answer": answer}, option=orjson.OPT_APPEND_NEWLINE))
        self._file.flush()
        self._known[name] = answer
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _read(self, path: Path) -> None:
        self._file.seek(0)
        raw = self._file.read()
        whole = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[:whole].splitlines(), 1):
            try:
                row = orjson.loads(line)
                self._known[row["question"]] = tuple(row["answer"])
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                fault = f"line {number}: {line[:40]!r} is no question with its answer"
                raise DataError(str(path), [fault]) from error
        self._file.truncate(whole)
