import pytest

from serve_apps.api_keys import ApiKey
from serve_apps.rate_limit import RateLimiter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(requests: int | None = None, tokens: int | None = None, id: str = "a") -> ApiKey:
    return ApiKey(id=id, sha256="0" * 64, requests_per_minute=requests, tokens_per_minute=tokens)


def test_requests_above_the_limit_wait_until_there_is_room() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    alice = key(requests=6)
    assert [limiter.admit(alice).lacking for _ in range(7)] == [None] * 6 + ["requests"]
    refused = limiter.admit(alice)
    assert refused.retry_after_s == 10
    assert refused.headers["x-ratelimit-limit-requests"] == "6"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += refused.retry_after_s
    assert limiter.admit(alice).lacking is None
    assert limiter.admit(alice).lacking == "requests"
    clock.now += 3600
    assert [limiter.admit(alice).lacking for _ in range(7)] == [None] * 6 + ["requests"]


def test_tokens_are_paid_for_before_the_next_request() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    alice = key(tokens=600)
    assert limiter.admit(alice).headers["x-ratelimit-remaining-tokens"] == "600"
    limiter.spend(alice, 700)
    refused = limiter.admit(alice)
    assert (refused.lacking, refused.retry_after_s) == ("tokens", 11)  # 101 tokens at ten a second
    clock.now += 11
    assert limiter.admit(alice).lacking is None


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    alice = key(requests=60, tokens=60)
    limiter.spend(alice, 120)
    assert {limiter.admit(alice).lacking for _ in range(100)} == {"tokens"}
    clock.now += 120
    assert limiter.admit(alice).lacking is None


def test_keys_have_limits_of_their_own_and_some_have_none() -> None:
    limiter = RateLimiter(clock=Clock())
    alice, bob = key(requests=1), key(requests=1, id="b")
    assert limiter.admit(alice).lacking is None
    assert limiter.admit(alice).lacking == "requests"
    assert limiter.admit(bob).lacking is None
    free = limiter.admit(key(id="c"))
    assert (free.lacking, free.headers) == (None, {})


@pytest.mark.parametrize(("limit", "replicas"), [(60, 4), (100, 3), (2, 8)])
def test_replicas_together_grant_no_more_than_the_limit_over_time(limit: int, replicas: int) -> None:
    clock = Clock()
    limiters = [RateLimiter(replicas, clock) for _ in range(replicas)]
    granted = 0
    minutes = 30
    for _ in range(minutes * 60):
        clock.now += 1
        granted += sum(limiter.admit(key(requests=limit)).lacking is None for limiter in limiters)
    assert granted <= limit * minutes + max(limit, replicas)  # what all were full of as it began


def test_a_limit_that_is_changed_holds_at_once() -> None:
    limiter = RateLimiter(clock=Clock())
    assert [limiter.admit(key(requests=1)).lacking for _ in range(2)] == [None, "requests"]
    assert [limiter.admit(key(requests=3)).lacking for _ in range(4)] == [None, None, None, "requests"]
