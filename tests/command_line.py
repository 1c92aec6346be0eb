"""A command as a shell starts it: its exit status and what it prints."""

import contextlib
import io
import sys
from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import patch


class Ran(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def invoke(main: Callable[[], None], *arguments: object, name: str = "command") -> Ran:
    """Run a console entry point; name is the script's."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", [name, *map(str, arguments)]),
        patch.object(sys, "excepthook", sys.excepthook),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
    return Ran(status, out.getvalue(), err.getvalue())
