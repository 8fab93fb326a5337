"""Limits per key: what passes, what waits and for how long, and that idle keys cost no memory."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.gateway.limits import Meters, estimate_tokens
from toolkit.gateway.openai import ApiError
from toolkit.gateway.refusals import duration, overloaded


class Clock:
    def __init__(self):
        self.now = 5_000_000.0

    def __call__(self):
        return self.now


def passes(meters, limit, amount=1, kind="requests"):
    try:
        meters.take("k", kind, limit, amount)
    except ApiError:
        return False
    return True


def test_an_idle_key_may_spend_a_minute_at_once_and_then_waits_for_the_refill():
    clock = Clock()
    meters = Meters(clock)
    assert [passes(meters, 3) for _ in range(4)] == [True, True, True, False]
    clock.now += 19.9
    assert not passes(meters, 3)
    clock.now += 0.2
    assert passes(meters, 3)


def test_a_refusal_says_when_to_come_back_and_that_is_true():
    clock = Clock()
    meters = Meters(clock)
    for _ in range(3):
        meters.take("k", "requests", 3, 1)
    clock.now += 1.5
    with pytest.raises(ApiError) as caught:
        meters.take("k", "requests", 3, 1)
    error = caught.value
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "requests")
    assert error.message == (
        "Rate limit reached for k on requests per min (RPM): Limit 3, Requested 1. Please try again in 18.5s."
    )
    assert error.headers["Retry-After"] == "19"
    assert error.headers["retry-after-ms"] == "18500"
    assert error.headers["x-ratelimit-limit-requests"] == "3"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert error.headers["x-ratelimit-reset-requests"] == "58.5s"
    clock.now += 18.5
    assert passes(meters, 3)


def test_a_refused_request_takes_nothing():
    clock = Clock()
    meters = Meters(clock)
    meters.take("k", "tokens", 100, 90)
    for _ in range(50):
        assert not passes(meters, 100, 20, "tokens")
    assert passes(meters, 100, 10, "tokens")


def test_a_request_that_never_fits_is_told_not_to_try_again():
    with pytest.raises(ApiError) as caught:
        Meters().take("k", "tokens", 100, 101)
    assert caught.value.message.startswith(
        "Request too large for k on tokens per min (TPM): Limit 100, Requested 101."
    )
    assert caught.value.headers == {"x-should-retry": "false"}


@given(
    limit=st.integers(1, 600),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 40)), min_size=1, max_size=60),
)
def test_over_any_span_a_key_gets_no_more_than_the_burst_and_the_rate(limit, steps):
    clock = Clock()
    meters = Meters(clock)
    taken = []
    for wait_s, amount in steps:
        clock.now += wait_s
        if passes(meters, limit, amount, "tokens"):
            taken.append((clock.now, amount))
    for i, (start, _) in enumerate(taken):
        for j in range(i, len(taken)):
            span_s = taken[j][0] - start
            total = sum(amount for _, amount in taken[i : j + 1])
            assert total <= limit * (1 + span_s / 60) + 1e-3


@given(limit=st.integers(1, 600), waits=st.lists(st.floats(0, 5), min_size=1, max_size=60))
def test_whoever_keeps_to_the_rate_is_never_refused(limit, waits):
    clock = Clock()
    meters = Meters(clock)
    for wait_s in waits:
        assert passes(meters, limit)
        clock.now += 60 / limit + wait_s


@given(
    limit=st.integers(10, 1000),
    used=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), max_size=20),
)
def test_settling_leaves_what_was_really_used(limit, used):
    clock = Clock()
    meters = Meters(clock)
    real = 0
    for estimate, tokens in used:
        if real + estimate > limit:
            break
        meters.take("k", "tokens", limit, estimate)
        meters.settle("k", "tokens", limit, tokens - estimate)
        real += tokens
    left = meters.standing("k", "tokens", limit).remaining
    assert left == max(0, limit - real)


def test_what_was_underestimated_is_a_debt_that_is_waited_for():
    clock = Clock()
    meters = Meters(clock)
    meters.take("k", "tokens", 60, 10)
    meters.settle("k", "tokens", 60, 110)  # 120 used: 60 s of debt beyond the minute
    assert not passes(meters, 60, 0, "tokens")
    clock.now += 61
    assert passes(meters, 60, 1, "tokens")


def test_keys_and_kinds_do_not_share_a_bucket():
    meters = Meters(Clock())
    meters.take("a", "requests", 1, 1)
    meters.take("b", "requests", 1, 1)
    meters.take("a", "tokens", 1, 1)
    assert not passes(meters, 1, 2)


def test_idle_buckets_are_forgotten_and_memory_is_flat_over_100000_keys():
    clock = Clock()
    meters = Meters(clock)
    most = 0
    tracemalloc.start()
    try:
        for i in range(100_000):
            clock.now += (
                0.01  # 100 requests/s, each of another key: 60 s / limit until a bucket is full
            )
            meters.take(f"key-{i}", "requests", 60, 1)
            most = max(most, len(meters))
            if i == 10_000:
                early = tracemalloc.get_traced_memory()[0]
        late = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert most < 500
    assert late < early + 100_000


def test_a_bucket_in_debt_does_not_keep_others_from_being_forgotten():
    clock = Clock()
    meters = Meters(clock)
    meters.settle("debtor", "tokens", 1, 1000)
    for i in range(1000):
        clock.now += 0.1
        meters.take(f"key-{i}", "requests", 600, 1)
    assert len(meters) < 20
    with pytest.raises(ApiError):
        meters.take("debtor", "tokens", 1, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.12, "120ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (360, "6m0s"),
        (61.5, "1m1.5s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds, text):
    assert duration(seconds) == text


def test_an_overloaded_server_says_when_to_come_back():
    error = overloaded(4096)
    assert (error.status, error.headers["Retry-After"]) == (503, "1")
    assert "4096 requests are open" in error.message


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"messages": [{"role": "user", "content": "x" * 396}], "max_tokens": 50}, 100 + 50),
        ({"messages": [{"role": "user", "content": "x" * 396}], "max_completion_tokens": 7}, 107),
        ({"prompt": "x" * 40, "n": 3, "max_tokens": 10}, 10 + 30),
        ({"prompt": [1, 2, 3], "max_tokens": 1}, 4),
        ({"prompt": [[1, 2], [3]], "max_tokens": 1}, 4),
        ({"prompt": "日本", "max_tokens": 1}, 2 + 1),
        ({"input": ["x" * 8, "x" * 8]}, 4),
        ({"prompt": ""}, 256),
        ({"prompt": "", "max_tokens": "many"}, 256),
        ({"prompt": "", "max_tokens": -5}, 0),
        (
            {
                "messages": [
                    {"content": [{"type": "image_url", "image_url": {"url": "data:" + "A" * 9999}}]}
                ],
                "max_tokens": 1,
            },
            3 + 1,
        ),
    ],
)
def test_estimates(body, tokens):
    assert estimate_tokens(body) == tokens


def test_the_recipes_cap_is_the_estimate_of_a_request_that_states_none():
    assert estimate_tokens({"prompt": ""}, default_max_tokens=64) == 64
