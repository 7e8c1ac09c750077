"""How much each key has left this minute: requests, and tokens of prompts and answers.

In: a key, and what its requests took. Out: whether the next may come, and what OpenAI's `x-ratelimit-*` headers say.
Counts for one ingress replica: of several each grants its share, so that together they never grant more than the limit.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from serve_apps.api_keys import ApiKey


@dataclass
class Bucket:
    """An allowance that fills by `per_minute`, up to a minute's worth, and may be overdrawn.

    Tokens are known when an answer has ended: a request may come while anything is left, and what it took too much is
    paid for before the next.
    """

    per_minute: float
    level: float
    at: float

    @property
    def capacity(self) -> float:
        """The most that it holds: one request at least, for a smaller one would never let any through."""
        return max(1.0, self.per_minute)

    def fill(self, now: float) -> None:
        """Add what came since the last time."""
        self.level = min(self.capacity, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now

    def seconds_until(self, level: float) -> float:
        """Until it holds `level`."""
        return max(0.0, (level - self.level) * 60 / self.per_minute)


@dataclass(frozen=True)
class Verdict:
    """Whether a request may come.

    Args:
        lacking: what there is too little of, "requests" or "tokens"; None if it may.
        retry_after_s: when there will be enough.
    """

    lacking: str | None = None
    retry_after_s: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class RateLimiter:
    """Allowances of all keys.

    Args:
        replicas: that share each key's limits.
        clock: seconds that only grow.
    """

    def __init__(self, replicas: int = 1, clock: Callable[[], float] = time.monotonic):
        self._replicas = replicas
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def admit(self, key: ApiKey) -> Verdict:
        """Count a request, if it may come."""
        requests = self._bucket(key.id, "requests", key.requests_per_minute)
        tokens = self._bucket(key.id, "tokens", key.tokens_per_minute)
        lacking, seconds = None, 0.0
        if requests and requests.level < 1:
            lacking, seconds = "requests", requests.seconds_until(1)
        elif tokens and tokens.level <= 0:
            lacking, seconds = "tokens", tokens.seconds_until(1)
        elif requests:
            requests.level -= 1
        headers = _headers("requests", key.requests_per_minute, requests)
        headers |= _headers("tokens", key.tokens_per_minute, tokens)
        return Verdict(lacking, max(1, math.ceil(seconds)) if lacking else 0, headers)

    def spend(self, key: ApiKey, tokens: int) -> None:
        """Count the tokens of a request."""
        if bucket := self._bucket(key.id, "tokens", key.tokens_per_minute):
            bucket.level -= tokens

    def _bucket(self, id: str, what: str, limit: int | None) -> Bucket | None:
        if limit is None:
            return None
        now = self._clock()
        share = limit / self._replicas
        bucket = self._buckets.get((id, what))
        if bucket is None or bucket.per_minute != share:  # new, or its limit was changed
            bucket = self._buckets[id, what] = Bucket(share, max(1.0, share), now)
        bucket.fill(now)
        return bucket


def _headers(what: str, limit: int | None, bucket: Bucket | None) -> dict[str, str]:
    if limit is None or bucket is None:
        return {}
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(max(0, math.floor(bucket.level))),
        f"x-ratelimit-reset-{what}": f"{bucket.seconds_until(bucket.capacity):.3f}s",
    }
