"""The response cache: what is kept, for whom, for how long, in memory and in a real Redis."""

import asyncio
import json
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import redis_server
from toolkit.errors import NotInstalledError, ToolkitError
from toolkit.gateway import cache as module
from toolkit.gateway.access import Admitted, Bearer
from toolkit.gateway.cache import (
    MemoryCache,
    RedisCache,
    cache_of,
    certificate_digest,
    is_deterministic,
    key_of,
)
from toolkit.gateway.limits import Meters
from toolkit.gateway.table import Table, Target
from toolkit.recipe.front import CacheSection, LimitsSection

server = redis_server.server
CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
TARGET = Target("m@1", "adapter", "1")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def admitted(tenant="acme", key_class="key", key_id="k"):
    return Admitted(Bearer(key_id, tenant, key_class, LimitsSection()), Meters())


def key(body=BODY, who=None, certificate="c", target=TARGET, path=CHAT):
    return key_of(who or admitted(), certificate, target, path, body)


def run(coroutine):
    return asyncio.run(coroutine)


# --- what is kept


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 1, "seed": 7},
        {"temperature": None, "seed": 0},
        {"n": 1},
        {"tools": []},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_requests_that_are_answered_the_same_again(more):
    assert is_deterministic(CHAT, BODY | more, {})


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0.1},
        {"temperature": None},
        {"temperature": "0"},
        {"temperature": 1, "seed": True},
        {"temperature": 1, "seed": None},
        {"stream": True},
        {"n": 2},
        {"best_of": 3},
        {"use_beam_search": True},
        {"tools": [{"type": "function"}]},
        {"functions": [{"name": "f"}]},
    ],
)
def test_requests_that_are_asked_anew(more):
    assert not is_deterministic(CHAT, BODY | more, {})


def test_a_request_without_temperature_is_sampled():
    assert not is_deterministic(CHAT, {"messages": []}, {})


def test_embeddings_are_always_the_same():
    assert is_deterministic("/v1/embeddings", {"input": "x"}, {})


@pytest.mark.parametrize("directive", ["no-cache", "No-Store", "max-age=0, no-cache"])
def test_a_client_may_ask_for_a_new_answer(directive):
    assert not is_deterministic(CHAT, BODY, {"cache-control": directive})


# --- for whom


def test_a_key_tells_nothing_of_the_request():
    assert len(key()) == 64
    assert set(key()) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    "other",
    [
        {"who": admitted(tenant="other")},
        {"who": admitted(key_class="jwt")},
        {"who": admitted(key_class="none")},
        {"certificate": "d"},
        {"target": Target("m@2", "adapter", "2")},
        {"target": Target("m@1", "adapter", "2")},
        {"path": "/v1/completions"},
        {"body": BODY | {"seed": 1}},
        {"body": BODY | {"max_tokens": 1}},
        {"body": BODY | {"messages": [{"role": "user", "content": "Hi"}]}},
        {"body": BODY | {"cache_salt": "x"}},
        {"body": BODY | {"a_field_of_next_year": 1}},
    ],
)
def test_whatever_changes_the_answer_changes_the_key(other):
    assert key(**other) != key()


@pytest.mark.parametrize(
    "more",
    [
        {"user": "u"},
        {"request_id": "r"},
        {"metadata": {"a": "b"}},
        {"stream": False},
        {"store": True},
        {"priority": 1},
    ],
)
def test_what_does_not_change_the_answer_does_not_change_the_key(more):
    assert key(BODY | more) == key()


def test_two_keys_of_one_tenant_share_answers():
    assert key(who=admitted(key_id="a", key_class="batch")) == key(who=admitted(key_id="b"))


def test_a_subject_named_like_a_tenant_does_not_share_its_answers():
    assert key(who=admitted(tenant="acme", key_class="jwt")) != key(who=admitted(tenant="acme"))


@given(st.permutations(list(BODY)))
def test_the_order_of_fields_does_not_matter(order):
    assert key({name: BODY[name] for name in order}) == key()


def test_text_that_is_no_unicode_has_a_key_too():
    assert len(key(BODY | {"stop": json.loads('"\\ud800"')})) == 64


def test_another_certificate_is_another_digest():
    def digest(**certificate):
        return certificate_digest(Table(None, (), 1, True, certificate=certificate))

    assert digest(a=1) == digest(a=1) != digest(a=2)
    assert digest(a=1, answers="x") == digest(a=2, answers="x") != digest(a=1, answers="y")


# --- memory


def test_an_answer_is_kept_until_it_is_old():
    clock = Clock()
    cache = MemoryCache(1_000_000, 60, clock)
    run(cache.put("a", b"answer"))
    clock.now += 59.9
    assert run(cache.get("a")) == b"answer"
    clock.now += 0.2
    assert run(cache.get("a")) is None
    assert cache.size_bytes == len(cache) == 0


def test_the_least_recently_used_answers_go_first():
    cache = MemoryCache(10 * (100 + module.ENTRY_BYTES), 60)
    for i in range(10):
        run(cache.put(str(i), b"x" * 100))
    assert run(cache.get("0")) is not None
    run(cache.put("new", b"x" * 100))
    assert run(cache.get("0")) is not None
    assert run(cache.get("1")) is None


def test_a_large_answer_does_not_push_out_the_others():
    cache = MemoryCache(8000, 60)
    run(cache.put("small", b"x"))
    run(cache.put("large", b"x" * 4000))
    assert run(cache.get("large")) is None
    assert run(cache.get("small")) == b"x"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2000)), max_size=100))
def test_the_size_is_counted_right_and_never_above_the_limit(puts):
    cache = MemoryCache(10_000, 60)
    for name, size in puts:
        run(cache.put(str(name), b"x" * size))
        entries = cache._entries.values()
        assert cache.size_bytes == sum(len(a) + module.ENTRY_BYTES for _, a in entries) <= 10_000


# --- Redis


def with_redis(server, scenario, ttl_s=60):
    async def run_it():
        clock = Clock()
        cache = RedisCache(server.url, 1_000_000, ttl_s, clock)
        try:
            return await scenario(cache, clock)
        finally:
            await cache.close()

    return asyncio.run(run_it())


def test_redis_keeps_answers_for_all_fronts(server):
    async def write(cache, clock):
        assert await cache.get("a") is None
        await cache.put("a", b'{"x": "\xc3\xa4"}')

    async def read(cache, clock):
        assert await cache.get("a") == b'{"x": "\xc3\xa4"}'

    with_redis(server, write)
    with_redis(server, read)


def test_redis_forgets_old_answers_and_takes_no_large_ones(server):
    async def scenario(cache, clock):
        await cache.put("a", b"x")
        await cache.put("large", b"x" * 200_000)
        assert await cache.get("large") is None
        assert await cache.get("a") == b"x"
        await asyncio.sleep(0.3)
        assert await cache.get("a") is None

    with_redis(server, scenario, ttl_s=0.25)


def test_an_outage_of_redis_is_a_miss_and_is_not_waited_for_again(server, caplog):
    async def scenario(cache, clock):
        await cache.put("a", b"x")
        server.stop()
        assert await cache.get("a") is None
        await cache.put("b", b"x")
        assert caplog.text.count("Redis does not answer") == 1
        server.start()
        assert await cache.get("a") is None  # still paused
        clock.now += 5
        await cache.put("a", b"y")
        assert await cache.get("a") == b"y"

    with_redis(server, scenario)


def test_a_redis_that_hangs_costs_one_request_a_quarter_of_a_second(server):
    import signal

    async def scenario(cache, clock):
        await cache.put("a", b"x")
        server.process.send_signal(signal.SIGSTOP)
        try:
            start = time.monotonic()
            assert await cache.get("a") is None
            for _ in range(100):
                assert await cache.get("a") is None
            assert time.monotonic() - start < 5  # 100 time-outs would take 25 s
        finally:
            server.process.send_signal(signal.SIGCONT)

    with_redis(server, scenario)


def test_an_error_of_redis_is_a_miss(server):
    import redis

    async def scenario(cache, clock):
        client = redis.Redis(port=server.port)
        client.lpush(module.REDIS_PREFIX + "a", "not a string")
        client.close()
        assert await cache.get("a") is None

    with_redis(server, scenario)


# --- settings


def test_without_a_section_there_is_no_cache():
    assert cache_of(None) is None


def test_memory_is_the_default():
    assert isinstance(cache_of(CacheSection()), MemoryCache)


def test_redis_needs_a_url():
    with pytest.raises(ValueError, match="`kind: redis` needs `url_env`"):
        CacheSection(kind="redis")
    section = CacheSection(kind="redis", url_env="NOT_SET")
    with pytest.raises(ToolkitError, match="names NOT_SET, and Redis needs a URL there") as caught:
        cache_of(section, {})
    assert "export REDIS_URL=" in caught.value.hint


def test_a_wrong_url_is_not_repeated_because_it_may_hold_a_password():
    section = CacheSection(kind="redis", url_env="URL")
    with pytest.raises(ToolkitError) as caught:
        cache_of(section, {"URL": "http://:geheim@host"})
    assert "geheim" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(NotInstalledError, match="the package redis is not installed") as caught:
        cache_of(CacheSection(kind="redis", url_env="URL"), {"URL": "redis://h"})
    assert caught.value.hint == "pip install 'toolkit[redis]'"
