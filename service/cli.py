"""`onesearch-serve BUNDLE…`: open everything, refuse with every fault at once, else serve until stopped."""

from pathlib import Path
from typing import Annotated

import typer

from onesearch.command import run
from service.settings import load_settings
from service.workers import Supervisor, open_app, serve_app


def serve(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders; each is a source of variants.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on [ONESEARCH_HOST].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for a free one [ONESEARCH_PORT].")] = None,
    experiments: Annotated[
        Path | None, typer.Option(help="TOML file of variants and experiments [ONESEARCH_EXPERIMENTS].")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that serve the port [ONESEARCH_WORKERS].")] = None,
) -> None:
    """Serve bundles over HTTP."""
    settings = load_settings(host=host, port=port, experiments=experiments, workers=workers)
    if settings.workers > 1:
        raise typer.Exit(Supervisor(bundles, settings).run())
    serve_app(open_app(bundles, settings), settings)


def main() -> None:
    """The console script."""
    run(serve)
