import pytest
from redis.asyncio import Redis
from redis_server import RedisServer
from tiny_bundle import write_tiny_bundle

from model_export.cli import export_onnx
from model_export.to_tensorrt import TensorRtConfig, export_tensorrt
from service.store import redis_store, sqlite_store

TTL, RETENTION = 1000.0, 500.0


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A tiny bundle exported in both precisions, its stamp, and the steps the exporter announced."""
    path, _ = write_tiny_bundle(tmp_path_factory.mktemp("export"))
    steps = []
    return path, export_onnx(path, "int8", steps.append), steps


@pytest.fixture(scope="session")
def kit(exported, tmp_path_factory):
    """A TensorRT kit of the tiny bundle, the decoder graphs and one search in fp16, and its parity report."""
    out = tmp_path_factory.mktemp("tensorrt") / "kit"
    report = export_tensorrt(exported[0], out, TensorRtConfig((512,), (2,), 20), lambda step: None)
    return out, report


@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    """A real Redis that tests share; they flush it."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server.url
    server.kill()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
async def store(request, tmp_path):
    """An empty store of either kind: what holds for one must hold for the other."""
    if request.param == "sqlite":
        opened = sqlite_store(tmp_path / "state.sqlite3", TTL, RETENTION)
    else:
        url = request.getfixturevalue("redis_url")
        async with Redis.from_url(url) as client:
            await client.flushall()
        opened = redis_store(url, TTL, RETENTION, timeout_seconds=5.0)
    yield opened
    await opened.close()
