"""How every command line of the project starts: one function becomes one command."""

import sys
from collections.abc import Callable
from pathlib import Path

import typer

from onesearch.errors import OneSearchError

REFUSED = 2
"""Exit status of a command that was asked for something it cannot do."""
HELP = {"help_option_names": ["-h", "--help"]}
"""Settings of a command: help under both names."""


def run(command: Callable[..., None]) -> None:
    """Parse the command line and call `command`, whose signature and docstring describe it; then exit as `start`.

    The local variables of an error nobody expected are not printed: they may hold keys.
    """
    app = typer.Typer(add_completion=False, context_settings=HELP, pretty_exceptions_show_locals=False)
    app.command()(command)
    start(app)


def start(app: typer.Typer) -> None:
    """Parse the command line and exit. What is wrong with what was asked, or a file that cannot be read or written, is
    told after the command's name, with status REFUSED.
    """
    try:
        app()
    except (OneSearchError, OSError) as error:
        typer.secho(f"{Path(sys.argv[0]).stem}: {error}", fg="red", err=True)
        raise SystemExit(REFUSED) from error
