"""What the service tells of itself: Prometheus metrics of one app, and log lines as JSON without user data."""

import logging
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        shared: dict[str, Any] = {"namespace": "onesearch", "registry": self._registry}
        self._requests = Counter("requests", "Requests answered.", ["route", "variant", "status"], **shared)
        self._latency = Histogram(
            "request_seconds", "Time to answer.", ["route", "variant"], buckets=_BUCKETS, **shared
        )
        self._stages = Histogram(
            "stage_seconds", "Time of one stage of a search.", ["stage", "variant"], buckets=_BUCKETS, **shared
        )
        self._degraded = Counter("degraded", "Searches answered with less.", ["reason"], **shared)
        self._events = Counter("events", "Events accepted.", ["type"], **shared)
        self._served = Gauge("variant_info", "Variants served.", ["variant", "model", "catalog"], **shared)

    def request(self, route: str, variant: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self._requests.labels(route, variant, str(status)).inc()
        self._latency.labels(route, variant).observe(seconds)

    def search(self, variant: str, timings_ms: Mapping[str, float], degraded: list[str]) -> None:
        """Count the stages of one search and what it went without."""
        for stage, spent in timings_ms.items():
            self._stages.labels(stage, variant).observe(spent / 1e3)
        for reason in degraded:
            self._degraded.labels(reason).inc()

    def event(self, kind: str) -> None:
        """Count one accepted event."""
        self._events.labels(kind).inc()

    def variant(self, name: str, model_version: str, catalog_version: str) -> None:
        """Announce a served variant."""
        self._served.labels(name, model_version, catalog_version).set(1)

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self._registry)


class JsonFormatter(logging.Formatter):
    """One JSON object per record; structured values come in `extra={"fields": {...}}`.

    Of an exception only its class and where it was raised are logged: its text may quote what a user typed.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])
            line["frames"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return orjson.dumps(line, default=str).decode()


def log_config(level: str) -> dict[str, Any]:
    """Logging configuration of the process: JSON lines on stderr, the server's own included."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "root": {"handlers": ["stderr"], "level": level.upper()},
    }
