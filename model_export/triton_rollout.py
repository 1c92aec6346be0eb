"""`onesearch-triton`: new versions, rollbacks and new catalogs for a running Triton server and its repository.

    onesearch-triton deploy BUNDLE REPOSITORY --server HOST:PORT    write the next version, check it, switch to it
    onesearch-triton rollback REPOSITORY --server HOST:PORT         switch to the version before
    onesearch-triton catalog BUNDLE REPOSITORY                      publish the trie of a bundle for searches to ask for
    onesearch-triton status REPOSITORY [--server HOST:PORT]

The switch is Triton's own: the new version is loaded, replays its recorded answers and is warmed beside the old
one, which then ends its last searches and goes. A version that fails leaves everything as it was. The server must
run with --model-control-mode=explicit and see the same repository.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import tritonclient.grpc as grpc
import typer
from tritonclient.utils import InferenceServerException

from model_export.to_triton import (
    MODELS,
    RECORD,
    Serving,
    activate,
    active_version,
    publish_catalog,
    read_about,
    remove_version,
    versions,
    write_version,
)
from onesearch import remote
from onesearch.command import HELP, start
from onesearch.errors import ExportError

LOAD_SECONDS = 600.0
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings=HELP,
    help="Roll out models and catalogs on Triton.",
)
Repository = Annotated[Path, typer.Argument(help="the model repository")]
Server = Annotated[str, typer.Option(help="gRPC address of the server, HOST:PORT")]


def deploy(
    bundle: Path, repository: Path, server: str, say: Callable[[str], None], engines: Path | None = None
) -> int:
    """Add a bundle as the next version, served as the present one is, and switch to it; returns its number.

    engines: as for `write_version`.

    Raises ExportError when the version cannot be written or the server refuses it; then nothing has changed.
    """
    before = active_version(repository)
    number = versions(repository)[-1] + 1
    write_version(bundle, repository, number, Serving(**read_about(repository, before)["serving"]), say, engines)
    try:
        switch(repository, number, server)
    except BaseException:
        remove_version(repository, number)
        raise
    return number


def rollback(repository: Path, server: str, to: int | None = None) -> int:
    """Switch to an earlier version, by default the one before the present; returns its number. Raises ExportError."""
    before = active_version(repository)
    earlier = [number for number in versions(repository) if number < before]
    number = to if to is not None else max(earlier, default=None)
    if number is None or number not in versions(repository):
        raise ExportError(f"repository {repository}", [f"has no version {to or f'before {before}'}"])
    switch(repository, number, server)
    return number


def switch(repository: Path, number: int, server: str) -> None:
    """Serve a version. Raises ExportError when the server refuses it; then the present one is served on."""
    before = active_version(repository)
    try:
        _load(repository, number, server, before)
        _ask(repository, number, server)
    except BaseException:
        _load(repository, before, server, before)
        raise


def _load(repository: Path, number: int, server: str, before: int) -> None:
    """Have the server load a version; the graphs of the one before stay, so that its last searches can end."""
    served = read_about(repository, number)["serving"]["graphs"]
    activate(repository, number, beside=before)
    with _client(server) as client:
        for model in MODELS[-1:] if served == "in-process" else MODELS:
            client.load_model(model, client_timeout=LOAD_SECONDS)


def _ask(repository: Path, number: int, server: str) -> None:
    """One recorded search, which makes a version prove itself."""
    call, _ = remote.read_recorded(repository / remote.MODEL / str(number) / RECORD)[0]
    types = {tensor.name: tensor.dtype for tensor in remote.inputs(call.prompt.history.shape[-1])}
    inputs = [
        grpc.InferInput(name, [1, *array.shape], types[name]).set_data_from_numpy(array[None])
        for name, array in call.tensors().items()
    ]
    with _client(server) as client:
        client.infer(remote.MODEL, inputs, model_version=str(number), client_timeout=LOAD_SECONDS)


@contextmanager
def _client(server: str) -> Iterator[grpc.InferenceServerClient]:
    client = grpc.InferenceServerClient(server)
    try:
        yield client
    except InferenceServerException as error:
        raise ExportError(f"server {server}", [str(error.message())]) from error
    finally:
        client.close()


@app.command("deploy")
def _deploy(
    bundle: Annotated[Path, typer.Argument(help="an exported bundle")],
    repository: Repository,
    server: Server,
    engines: Annotated[Path | None, typer.Option(help="tensorrt: the bundle's kit, its engines built")] = None,
) -> None:
    """Write a bundle as the next version, have the server check and warm it, then switch."""
    number = deploy(bundle, repository, server, typer.echo, engines)
    typer.echo(f"serves version {number}, model {read_about(repository, number)['model_version']}")


@app.command("rollback")
def _rollback(
    repository: Repository,
    server: Server,
    to: Annotated[int | None, typer.Option(help="version to serve, by default the one before")] = None,
) -> None:
    """Switch back to an earlier version."""
    number = rollback(repository, server, to)
    typer.echo(f"serves version {number}, model {read_about(repository, number)['model_version']}")


@app.command("catalog")
def _catalog(
    bundle: Annotated[Path, typer.Argument(help="a bundle of the same identifiers")], repository: Repository
) -> None:
    """Publish the trie of a bundle; running servers open it when the first search asks for it."""
    typer.echo(f"published catalog {publish_catalog(bundle, repository)}")


@app.command("status")
def _status(
    repository: Repository,
    server: Annotated[str | None, typer.Option(help="gRPC address of the server, HOST:PORT")] = None,
) -> None:
    """The versions of a repository, and what the server says of them."""
    active = active_version(repository)
    for number in versions(repository):
        about = read_about(repository, number)
        words = [f"version {number}", f"model {about['model_version']}", f"catalog {about['catalog_version']}"]
        words += ["active"] if number == active else []
        if server is not None:
            with _client(server) as client:
                words += ["ready"] if client.is_model_ready(remote.MODEL, str(number)) else ["not loaded"]
        typer.echo(", ".join(words))


def main() -> None:
    """Console entry point."""
    start(app)
