"""The application: parts in, ASGI app out. No app exists until `create_app` is called."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.staticfiles import StaticFiles

from onesearch import __version__
from service import admin, problems, routes
from service.deployment import Deployment
from service.direct import DirectSearch
from service.envelope import Envelope
from service.experiments_file import watch_experiments
from service.items import Items
from service.limits import RateLimit
from service.memory import Memory
from service.pipeline import Pipeline
from service.readiness import Readiness
from service.settings import Settings
from service.store import Store
from service.telemetry import Metrics
from service.tracing import Tracer, open_tracer


def create_app(settings: Settings, deployment: Deployment, store: Store) -> FastAPI:
    """The service over an opened deployment and store; both belong to the app, which closes them at its end."""
    metrics = Metrics()
    readiness = Readiness(deployment.engines)
    tracer = open_tracer(settings.traces) if settings.traces else None
    rate_limit = RateLimit(settings.rate_limit, settings.client_header) if settings.rate_limit else None
    items = Items(deployment.engines, settings.catalog, settings.compact_after, metrics)
    for variant in deployment.variants.values():
        metrics.variant(variant.name, variant.engine.model_version, variant.engine.live.snapshot.version)
    app = FastAPI(
        title="onesearch",
        version=__version__,
        description="Generative e-commerce search. Errors are problem+json (RFC 9457).",
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # `Metrics` and `Tracer` say more for less
        routes=[
            *routes.router.routes,
            *admin.router.routes,
        ],  # a nested router would be searched anew for every request
        lifespan=_lifespan(settings, deployment, store, metrics, items, readiness, tracer),
    )
    app.state.readiness = readiness
    search = next(r for r in routes.router.routes if isinstance(r, APIRoute) and r.name == routes.search.__name__)
    app.add_middleware(DirectSearch, route=search, find=routes.find)
    app.add_middleware(Envelope, metrics=metrics, readiness=readiness, rate_limit=rate_limit, tracer=tracer)
    app.mount("/page", StaticFiles(directory=routes.PAGE), name="page")
    problems.install(app)
    return app


def _lifespan(
    settings: Settings,
    deployment: Deployment,
    store: Store,
    metrics: Metrics,
    items: Items,
    readiness: Readiness,
    tracer: Tracer | None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[routes.Parts]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[routes.Parts]:
        memory = Memory(store, settings, metrics, deployment.rates)
        watching = watch_experiments(settings.experiments, deployment, metrics)
        background = [asyncio.create_task(work) for work in (readiness.check(), watching)]
        memory.start()
        yield {
            "deployment": deployment,
            "pipeline": Pipeline(deployment, memory, settings, metrics, items.catch_up),
            "readiness": readiness,
            "metrics": metrics,
            "items": items,
            "admin_key": settings.admin_key,
        }
        for task in background:
            task.cancel()
        for engine in deployment.engines:
            await engine.runner.close()
        await items.close()
        await memory.close()
        await store.close()
        if tracer:
            await asyncio.to_thread(tracer.close)

    return lifespan
