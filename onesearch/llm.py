"""Asks any OpenAI-compatible chat endpoint: bounded in time, paced, retried, and accounted for.

The `openai` client speaks the protocol and retries what is worth retrying (connection errors, timeouts, 408, 409,
429 with Retry-After, 5xx); this file adds what it leaves open. It comes with the extra `llm`.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from onesearch.errors import ConfigError, ProviderError


@dataclass(frozen=True)
class LlmConfig:
    """An endpoint such as `http://host:8000/v1`, and how to use it. Prices are per million tokens.

    timeout_seconds bounds one try; a question is tried `1 + retries` times. requests_per_minute 0: as fast as asked.
    """

    url: str
    model: str
    key: str = "none"
    timeout_seconds: float = 30.0
    retries: int = 2
    requests_per_minute: float = 0.0
    max_tokens: int = 700
    prompt_price: float = 0.0
    completion_price: float = 0.0


@dataclass
class Usage:
    """What was spent so far. unreported counts answers whose endpoint did not tell their tokens."""

    answers: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0
    cost: float = 0.0


class LlmClient:
    """One endpoint. Used on one event loop."""

    def __init__(self, config: LlmConfig) -> None:
        """Raises ConfigError when the `openai` package is not installed."""
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise ConfigError('an LLM endpoint needs the extra "llm": pip install "onesearch[llm]"') from error
        self.config = config
        self.usage = Usage()
        self._next_start = 0.0
        self._client = AsyncOpenAI(
            base_url=config.url, api_key=config.key, timeout=config.timeout_seconds, max_retries=config.retries
        )

    async def ask(self, system: str, prompt: str) -> str:
        """The answer's text, not empty. Raises ProviderError when none can be had; its text quotes no prompt."""
        from openai import OpenAIError

        await self._pace()
        tries = 1 + self.config.retries
        try:
            async with asyncio.timeout(2 * tries * self.config.timeout_seconds):  # pauses between tries included
                answer = await self._client.chat.completions.create(
                    model=self.config.model,
                    messages=[{"role": "system", "content": system}, {"role": "user", "content": prompt}],
                    temperature=0.0,
                    max_tokens=self.config.max_tokens,
                )
            text = _text(answer)
        except (OpenAIError, TimeoutError, ValueError) as error:
            self.usage.failures += 1
            raise ProviderError(f"llm: {type(error).__name__}") from error
        except ProviderError:
            self.usage.failures += 1
            raise
        self._account(answer)
        return text

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _pace(self) -> None:
        """Wait for the next start; starts are spaced evenly."""
        if self.config.requests_per_minute <= 0:
            return
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + 60.0 / self.config.requests_per_minute
        await asyncio.sleep(start - now)

    def _account(self, answer: Any) -> None:
        usage, spent = self.usage, getattr(answer, "usage", None)
        usage.answers += 1
        if spent is None:
            usage.unreported += 1
            return
        usage.prompt_tokens += spent.prompt_tokens or 0
        usage.completion_tokens += spent.completion_tokens or 0
        config = self.config
        price = usage.prompt_tokens * config.prompt_price + usage.completion_tokens * config.completion_price
        usage.cost = price / 1e6


def _text(answer: Any) -> str:
    """The text of a completion. Endpoints that are only nearly compatible leave things out."""
    choices = getattr(answer, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    text = getattr(getattr(first, "message", None), "content", None)
    if not isinstance(text, str) or not text.strip():
        raise ProviderError("llm: the answer holds no text")
    if getattr(first, "finish_reason", None) == "length":
        raise ProviderError("llm: the answer was cut off")
    return text.strip()
