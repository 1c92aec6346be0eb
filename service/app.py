"""The application: parts in, ASGI app out. No app exists until `create_app` is called."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from onesearch import __version__
from service import problems, routes
from service.deployment import Deployment
from service.envelope import Envelope
from service.experiments_file import watch_experiments
from service.limits import RateLimit
from service.pipeline import Pipeline
from service.readiness import Readiness
from service.settings import Settings
from service.state import StateStore
from service.state_redis import RedisStore
from service.state_sqlite import SqliteStore
from service.telemetry import Metrics
from service.tracing import Tracer, open_tracer

_SQLITE = "sqlite:"
_SECONDS_PER_DAY = 86_400


def open_store(settings: Settings) -> StateStore:
    """The state store that the settings name. Raises ConfigError when it cannot be used."""
    ttl = settings.state_ttl_days * _SECONDS_PER_DAY
    if settings.state.startswith(_SQLITE):
        return SqliteStore(Path(settings.state.removeprefix(_SQLITE)), ttl)
    return RedisStore(settings.state, ttl, settings.state_timeout_ms / 1e3)


def create_app(settings: Settings, deployment: Deployment, store: StateStore) -> FastAPI:
    """The service over an opened deployment and store; both belong to the app, which closes them at its end."""
    metrics = Metrics()
    readiness = Readiness(deployment.engines)
    tracer = open_tracer(settings.traces) if settings.traces else None
    rate_limit = RateLimit(settings.rate_limit, settings.client_header) if settings.rate_limit else None
    for variant in deployment.variants.values():
        metrics.variant(variant.name, variant.engine.model_version, variant.engine.live.snapshot.version)
    app = FastAPI(
        title="onesearch",
        version=__version__,
        description="Generative e-commerce search. Errors are problem+json (RFC 9457).",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan(settings, deployment, store, metrics, readiness, tracer),
    )
    app.state.readiness = readiness
    app.add_middleware(Envelope, metrics=metrics, readiness=readiness, rate_limit=rate_limit, tracer=tracer)
    app.include_router(routes.router)
    app.mount("/page", StaticFiles(directory=routes.PAGE), name="page")
    problems.install(app)
    return app


def _lifespan(
    settings: Settings,
    deployment: Deployment,
    store: StateStore,
    metrics: Metrics,
    readiness: Readiness,
    tracer: Tracer | None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[routes.Parts]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[routes.Parts]:
        checking = asyncio.create_task(readiness.check())
        watching = asyncio.create_task(watch_experiments(settings.experiments, deployment, metrics))
        yield {
            "deployment": deployment,
            "pipeline": Pipeline(deployment, store, settings, metrics),
            "readiness": readiness,
            "metrics": metrics,
        }
        checking.cancel()
        watching.cancel()
        for engine in deployment.engines:
            await engine.runner.close()
        await store.close()
        if tracer:
            await asyncio.to_thread(tracer.close)

    return lifespan
