"""What the service tells of itself: Prometheus metrics of one app, and log lines as JSON without user data."""

import logging
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TypeVar

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.multiprocess import MultiProcessCollector

from onesearch import __version__
from onesearch.llm import Usage

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable by which prometheus-client, when imported, learns the folder where workers share their metrics."""
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

M = TypeVar("M", bound=MetricWrapperBase)


class _Children(dict[tuple[str, ...], M]):
    """The children of a labelled metric by their label values; `labels` itself is slow for every request."""

    def __init__(self, metric: M) -> None:
        super().__init__()
        self._metric = metric

    def __missing__(self, values: tuple[str, ...]) -> M:
        child = self[values] = self._metric.labels(*values)
        return child


class Metrics:
    """The metrics of one app, in a registry of its own; of all workers together where several serve one port."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._shared = bool(os.environ.get(SHARED_FOLDER))
        shared: dict[str, Any] = {"namespace": "onesearch", "registry": self._registry}
        timed: dict[str, Any] = {**shared, "buckets": _BUCKETS}
        asked, staged = ["route", "variant"], ["stage", "variant"]
        self._requests = _Children(Counter("requests", "Requests answered.", [*asked, "status"], **shared))
        self._latency = _Children(Histogram("request_seconds", "Time to answer.", asked, **timed))
        self._stages = _Children(Histogram("stage_seconds", "Time of one stage of a search.", staged, **timed))
        self._degraded = Counter("degraded", "Searches answered with less.", ["reason"], **shared)
        self._widths = _Children(Counter("searches", "Searches by beam width.", ["variant", "width"], **shared))
        self._problems = Counter("problems", "Requests answered with a problem.", ["code"], **shared)
        self._events = Counter("events", "Events accepted.", ["type"], **shared)
        self._reloads = Counter("experiments_reloads", "Changes of the experiments file.", ["outcome"], **shared)
        self._repeated = Counter("events_repeated", "Events that were in the log already.", **shared)
        self._dropped = Counter("outbox_dropped", "Deferred writes given up.", ["kind"], **shared)
        self._keywords = Counter("keyword_lookups", "Keyword lookups by what was found.", ["result"], **shared)
        self._results = Counter("result_lookups", "Lookups in the cache of answers.", ["result"], **shared)
        versions = ["variant", "model", "catalog"]
        self._served = Gauge("variant_info", "Variants served.", versions, multiprocess_mode="livemax", **shared)
        latest: dict[str, Any] = {**shared, "multiprocess_mode": "livemostrecent"}
        self._changes = Counter("item_changes", "Changes of items accepted.", ["kind"], **shared)
        self._compactions = Counter("compactions", "Compactions of the catalog.", **shared)
        self._rollbacks = Counter("rollbacks", "Rollbacks of the catalog.", **shared)
        self._items = Gauge("catalog_items", "Items served.", ["bundle"], **latest)
        self._sequence = Gauge("catalog_sequence", "Number of the last change served.", ["bundle"], **latest)
        live: dict[str, Any] = {**shared, "multiprocess_mode": "livesum"}
        self._waiting = Gauge("searches_waiting", "Searches in the queue.", **live)
        self._running = Gauge("searches_running", "Searches that run.", **live)
        self._breaker = Gauge("store_breaker", "Processes whose breaker is in a state.", ["state"], **live)
        self._queue = Gauge("keyword_jobs", "Keyword jobs in the store.", ["state"], **latest)
        self._lag = Gauge("keyword_lag_seconds", "Age of the oldest waiting keyword job.", **latest)
        self.breaker("closed")
        Gauge("workers", "Processes that serve.", **live).set(1)
        Gauge("build_info", "Version of the service.", ["version"], **live).labels(__version__).set(1)

    def request(self, route: str, variant: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self._requests[route, variant, str(status)].inc()
        self._latency[route, variant].observe(seconds)

    def search(self, variant: str, width: int, timings_ms: Mapping[str, float], degraded: list[str]) -> None:
        """Count one search at a beam width, its stages and what it went without."""
        self._widths[variant, str(width)].inc()
        for stage, spent in timings_ms.items():
            self._stages[stage, variant].observe(spent / 1e3)
        for reason in degraded:
            self._degraded.labels(reason).inc()

    def problem(self, code: str) -> None:
        """Count one request that got a problem of a kind, such as overloaded."""
        self._problems.labels(code).inc()

    def load(self, waiting: int, running: int) -> None:
        """Tell how many searches wait and run."""
        self._waiting.set(waiting)
        self._running.set(running)

    def events(self, kinds: Iterable[str], repeated: int) -> None:
        """Count accepted events by type, and how many of them were known already."""
        for kind in kinds:
            self._events.labels(kind).inc()
        self._repeated.inc(repeated)

    def dropped(self, kind: str) -> None:
        """Count one deferred write that was given up while the store was away."""
        self._dropped.labels(kind).inc()

    def breaker(self, state: str) -> None:
        """Tell the state of the store's circuit breaker."""
        for name in ("closed", "half_open", "open"):
            self._breaker.labels(name).set(name == state)

    def keywords(self, result: str) -> None:
        """Count one keyword lookup: found for the user, for the query, or missing."""
        self._keywords.labels(result).inc()

    def result(self, outcome: Literal["hit", "shared", "miss"]) -> None:
        """Count one lookup in the cache of answers; shared: an equal search was running already."""
        self._results.labels(outcome).inc()

    def queue(self, waiting: int, dead: int, lag_seconds: float) -> None:
        """Tell the state of the keyword queue."""
        self._queue.labels("waiting").set(waiting)
        self._queue.labels("dead").set(dead)
        self._lag.set(lag_seconds)

    def experiments_reload(self, outcome: Literal["adopted", "refused"]) -> None:
        """Count a change of the experiments file."""
        self._reloads.labels(outcome).inc()

    def items_changed(self, kind: str, count: int) -> None:
        """Count accepted changes of items: put or remove."""
        self._changes.labels(kind).inc(count)

    def compacted(self) -> None:
        """Count one compaction."""
        self._compactions.inc()

    def rolled_back(self) -> None:
        """Count one rollback."""
        self._rollbacks.inc()

    def catalog(self, bundle: str, items: int, sequence: int) -> None:
        """Tell how many items of a bundle are served and which change was the last."""
        self._items.labels(bundle).set(items)
        self._sequence.labels(bundle).set(sequence)

    def variant(self, name: str, model_version: str, catalog_version: str) -> None:
        """Announce a served variant."""
        self._served.labels(name, model_version, catalog_version).set(1)

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format."""
        if not self._shared:
            return generate_latest(self._registry)
        everyone = CollectorRegistry()
        MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]
        return generate_latest(everyone)


class WorkerMetrics:
    """The metrics of one keyword worker; usage is what its language model spends."""

    def __init__(self, usage: Usage) -> None:
        self._registry = CollectorRegistry()
        shared: dict[str, Any] = {"namespace": "onesearch_keywords", "registry": self._registry}
        self._jobs = Counter("jobs", "Jobs settled.", ["outcome"], **shared)
        self._seconds = Histogram("job_seconds", "Time to make keywords.", buckets=_BUCKETS, **shared)
        lags = (0.1, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0)
        self._lag = Histogram("lag_seconds", "From a search that missed to its entry.", buckets=lags, **shared)
        self._queue = Gauge("queue_jobs", "Jobs in the store.", ["state"], **shared)
        self._oldest = Gauge("queue_lag_seconds", "Age of the oldest waiting job.", **shared)
        spent = (("prompt_tokens", "Tokens sent."), ("completion_tokens", "Tokens received."), ("cost", "Cost."))
        for name, text in (*spent, ("answers", "Answers."), ("failures", "Questions without an answer.")):
            Gauge(f"llm_{name}", text, **shared).set_function(partial(getattr, usage, name))

    def done(self, seconds: float, lag_seconds: float) -> None:
        """Count a finished job."""
        self._jobs.labels("done").inc()
        self._seconds.observe(seconds)
        self._lag.observe(lag_seconds)

    def failed(self, given_up: bool) -> None:
        """Count a failed try."""
        self._jobs.labels("given_up" if given_up else "retried").inc()

    def queue(self, waiting: int, dead: int, lag_seconds: float) -> None:
        """Tell the state of the queue."""
        self._queue.labels("waiting").set(waiting)
        self._queue.labels("dead").set(dead)
        self._oldest.set(lag_seconds)

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    def serve(self, port: int) -> Callable[[], None]:
        """Answer `/metrics` on a port, from a thread; returns what ends it."""
        server, thread = start_http_server(port, registry=self._registry)

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return close


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
    # What no line shows need not be found out for every record; `_srcfile` is how logging documents to do without
    # the place of the call.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "root": {"handlers": ["stderr"], "level": level.upper()},
    }
