"""`onesearch-serve BUNDLE…`: open everything, refuse with every fault at once, else serve until stopped."""

from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from onesearch.errors import OneSearchError
from service.app import create_app, open_store
from service.deployment import open_deployment
from service.settings import load_settings
from service.telemetry import log_config

REFUSED = 2


def serve(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders; each is a source of variants.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on [ONESEARCH_HOST].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for a free one [ONESEARCH_PORT].")] = None,
    variants: Annotated[Path | None, typer.Option(help="TOML file of variants [ONESEARCH_VARIANTS].")] = None,
) -> None:
    """Serve bundles over HTTP."""
    try:
        settings = load_settings(host=host, port=port, variants=variants)
        deployment = open_deployment(bundles, settings)
        app = create_app(settings, deployment, open_store(settings))
    except OneSearchError as error:
        typer.echo(f"onesearch-serve: {error}", err=True)
        raise typer.Exit(REFUSED) from error
    typer.echo(
        f"onesearch serves {', '.join(deployment.variants)} on http://{settings.host}:{settings.port}", err=True
    )
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        log_config=log_config(settings.log_level),
        access_log=False,  # it would log query strings, and with them what users typed
        server_header=False,
        timeout_graceful_shutdown=settings.drain_seconds,
    )


def main() -> None:
    """The console script."""
    typer.run(serve)
