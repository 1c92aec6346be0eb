"""How every command line of the project starts: one function becomes one command."""

import sys
from collections.abc import Callable
from pathlib import Path

import typer

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
    """Parse the command line and exit. A file that cannot be read or written is one line and status 2."""
    try:
        app()
    except OSError as error:
        typer.echo(f"{Path(sys.argv[0]).stem}: {error}", err=True)
        raise SystemExit(2) from error
