"""The rate limit per API client: off unless set, counted in each worker on its own."""

import math
import time

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.types import Scope

from onesearch.errors import ConfigError
from service.problems import Refused

_MAX_KEY = 128


class TooManyRequests(Refused):
    """A client sends more than its share."""

    code = "rate-limited"
    status = 429


class RateLimit:
    """Counts the requests of each client, known by a header or, without one, by its address."""

    def __init__(self, rate: str, client_header: str | None) -> None:
        """rate: like "50/second" or "1000/minute". Raises ConfigError for any other form."""
        try:
            self._limit = parse(rate)
        except ValueError as error:
            raise ConfigError(f"rate_limit: {rate!r} is no rate, expected one like 50/second") from error
        self._header = client_header.lower().encode() if client_header else None
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def check(self, scope: Scope) -> None:
        """Count one request. Raises TooManyRequests when it is one too many."""
        client = self._client(scope)
        if not self._limiter.hit(self._limit, client):
            again = self._limiter.get_window_stats(self._limit, client).reset_time - time.time()
            raise TooManyRequests(f"more than {self._limit}", retry_after=math.ceil(again))

    def _client(self, scope: Scope) -> str:
        if self._header:
            for name, value in scope["headers"]:
                if name == self._header:
                    return f"header:{value[:_MAX_KEY].decode('latin-1')}"
        address = scope.get("client")
        return f"address:{address[0] if address else ''}"
