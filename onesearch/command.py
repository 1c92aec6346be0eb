"""How every command line of the project starts: one function becomes one command."""

from collections.abc import Callable

import typer

HELP = {"help_option_names": ["-h", "--help"]}
"""Settings of a command: help under both names."""


def run(command: Callable[..., None]) -> None:
    """Parse the command line and call `command`, whose signature and docstring describe it; then exit.

    The local variables of an error nobody expected are not printed: they may hold keys.
    """
    app = typer.Typer(add_completion=False, context_settings=HELP, pretty_exceptions_show_locals=False)
    app.command()(command)
    app()
