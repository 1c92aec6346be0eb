"""Settings of the service: one frozen class, read from `ONESEARCH_*` variables and command-line overrides.

The process environment is read here and nowhere else. A variable that is not a setting is an error, because a
misspelt setting that is silently ignored is worse than a service that does not start.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from onesearch.errors import ConfigError
from onesearch.runtime import Precision

PREFIX = "ONESEARCH_"
_SECRETS = {"admin_key", "llm_key"}


class Settings(BaseSettings):
    """Every setting with its default; the variable of a field is `ONESEARCH_` and its name in upper case."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    experiments: Path | None = Field(
        default=None,
        description="TOML file of variants and experiments, reloaded when it changes; default: the bundles' own",
    )
    state: str = Field(
        default="sqlite:onesearch-state.sqlite3",
        pattern=r"^(sqlite:.+|rediss?://.+|unix://.+)",
        description="where user state lives: sqlite:PATH, redis://…, rediss://… or unix://…",
    )
    state_timeout_ms: int = Field(
        default=50, ge=1, le=60_000, description="longest wait of a search for user state"
    )
    state_write_timeout_ms: int = Field(
        default=1000,
        ge=1,
        le=60_000,
        description="longest wait for writes, such as events, that no search waits for",
    )
    state_ttl_days: float = Field(default=90.0, gt=0, description="history older than this is forgotten")
    log_retention_days: float = Field(
        default=30.0, gt=0, description="how long events and exposures stay in the log, and event ids known"
    )
    rates_refresh_seconds: float = Field(
        default=5.0, gt=0, description="how often counters of events reach the order of items in a SID"
    )
    keyword_ttl_days: float = Field(default=7.0, gt=0, description="how long keywords of a query count as fresh")
    llm_url: str | None = Field(
        default=None, description="OpenAI-compatible endpoint that makes keywords; default: the bundle's rules"
    )
    llm_model: str = Field(default="default", description="model to ask for")
    llm_key: SecretStr = Field(default=SecretStr("none"), description="key of the endpoint")
    llm_language: Literal["en", "zh"] = Field(default="en", description="language of the prompts")
    llm_timeout_seconds: float = Field(default=30.0, gt=0, description="longest wait for one try")
    llm_requests_per_minute: float = Field(default=0.0, ge=0, description="pace of one worker; 0: no limit")
    llm_prompt_price: float = Field(default=0.0, ge=0, description="price of a million prompt tokens")
    llm_completion_price: float = Field(default=0.0, ge=0, description="price of a million completion tokens")
    keyword_cache_size: int = Field(default=50_000, ge=1, description="keyword entries kept in this process")
    result_cache: int = Field(
        default=0, ge=0, le=1_000_000, description="answers kept in this process for equal searches; 0 keeps none"
    )
    catalog: Path = Field(
        default=Path("onesearch-catalog"), description="folder of the changes of items and what is made of them"
    )
    compact_after: int = Field(default=2000, ge=1, description="changed items that start a compaction")
    admin_key: SecretStr | None = Field(
        default=None, min_length=16, description="key that allows to change items; without one nobody may"
    )
    workers: int = Field(default=1, ge=1, le=64, description="processes that serve the port together")
    concurrency: int = Field(default=2, ge=1, le=256, description="searches that run at the same time, per worker")
    queue_limit: int = Field(default=16, ge=0, le=100_000, description="searches that may wait, per worker")
    deadline_ms: int = Field(default=2000, ge=1, le=60_000, description="deadline of a search that names none")
    rate_limit: str | None = Field(default=None, description="requests of one client per worker, like 50/second")
    client_header: str | None = Field(default=None, description="header that names the client, else its address")
    inference: str = Field(
        default="embedded",
        pattern=r"^(embedded|triton://[^/]+:\d+(/[A-Za-z0-9_.{}-]+)?)$",
        description="where the model runs: embedded, or triton://HOST:PORT[/MODEL] ({bundle}: the bundle's name)",
    )
    inference_fallback: Literal["none", "embedded"] = Field(
        default="none", description="what searches while the inference server is away: nothing, or this process"
    )
    inference_timeout_ms: int = Field(
        default=1000, ge=1, le=60_000, description="longest wait for the inference server"
    )
    threads: int = Field(default=1, ge=1, le=256, description="threads of one model call")
    precision: Precision = Field(default="fp32", description="fp32, or int8 for bundles exported with it")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="log threshold")
    traces: str | None = Field(default=None, description="OTLP/HTTP endpoint that traces are sent to")
    notice_seconds: float = Field(default=1.0, ge=0, le=600, description="not ready but serving, before shutdown")
    drain_seconds: int = Field(default=10, ge=0, le=600, description="time for running requests on shutdown")


def load_settings(**overrides: Any) -> Settings:
    """Settings from the process environment, then overrides that are not None.

    Raises ConfigError that lists every unknown variable and every wrong value.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    given = {name.upper() for name in os.environ if name.upper().startswith(PREFIX)}
    faults = [_unknown(name, sorted(known)) for name in sorted(given - known)]
    try:
        settings = Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        faults += [_wrong(str(e["loc"][0]), e["input"], e["msg"]) for e in error.errors()]
    if faults:
        raise ConfigError("\n  - ".join([f"settings: {len(faults)} fault(s)", *faults]))
    return settings


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.removeprefix(PREFIX), [k.removeprefix(PREFIX) for k in known], n=1)
    hint = f"did you mean {PREFIX}{near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{name}: is not a setting; {hint}"


def _wrong(field: str, value: object, message: str) -> str:
    shown = "it" if field in _SECRETS else re.sub(r"//[^/@]*@", "//…@", repr(value))  # no password of an address
    return f"{PREFIX}{field.upper()}: {shown} is wrong: {message}"
