"""Who is let in: keys, tokens, both, or everyone on loopback; with the answers that OpenAI's clients expect."""

import asyncio
import json
import time

import jwt as pyjwt
import pytest

from toolkit.errors import ToolkitError
from toolkit.gateway.access import access_of
from toolkit.gateway.exposure import is_loopback
from toolkit.gateway.keys import editing
from toolkit.gateway.openai import ApiError
from toolkit.gateway.settings import GatewaySettings
from toolkit.recipe.front import FrontSection

SECRET = "s" * 32
JWT = {"issuer": "i", "audience": "a", "secret_env": "TEST_JWT_SECRET"}


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("TEST_JWT_SECRET", SECRET)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def key(path, name="app", **fields):
    with editing(path) as keys:
        return keys.create(name, **fields)


def token(sub="alice", **more):
    values = {"iss": "i", "aud": "a", "sub": sub, "exp": time.time() + 60} | more
    return pyjwt.encode(values, SECRET, "HS256")


def access(path=None, host="127.0.0.1", **front):
    settings = GatewaySettings(
        name="s", host=host, control="/c", front=FrontSection(**front), keys_file=path
    )
    return access_of(settings)


def admit(gate, shown=None, model=None, header=None):
    headers = {"authorization": header or f"Bearer {shown}"} if header or shown else {}
    return asyncio.run(gate.admit(headers, model))


def refusal(gate, **asked):
    with pytest.raises(ApiError) as caught:
        admit(gate, **asked)
    return caught.value


# --- beyond loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine(host):
    assert is_loopback(host)
    access(host=host)


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "::",
        "",
        "10.0.0.7",
        "192.168.1.1",
        "fe80::1",
        "my-host",
        "example.com",
        "localhost.example.com",
        "0",
        "127.1",
        "::ffff:10.0.0.1",
        "127.0.0.1 ",
    ],
)
def test_beyond_this_machine_nobody_gets_in_unasked(host, path):
    assert not is_loopback(host)
    with pytest.raises(ToolkitError, match="and the front lets everyone in") as caught:
        access(host=host)
    assert "toolkit keys create NAME" in caught.value.hint
    access(path, host=host, keys=True)
    access(host=host, jwt=JWT)


def test_the_error_names_what_every_interface_means():
    with pytest.raises(ToolkitError, match=r"serve.host is '0.0.0.0' \(every interface\)"):
        access(host="0.0.0.0")


def test_keys_without_a_file_are_refused():
    with pytest.raises(ToolkitError, match="no keys_file is set"):
        access(keys=True)


# --- everyone, on loopback


def test_without_keys_everyone_on_this_machine_is_let_in():
    admitted = admit(access())
    assert (admitted.key_id, admitted.tenant, admitted.key_class) == ("-", "-", "none")
    assert admitted.may("anything")
    assert admitted.headers == {}


def test_a_header_that_nobody_asked_for_is_ignored():
    assert admit(access(), shown="EMPTY").key_class == "none"


# --- keys


def test_a_key_lets_in_its_bearer(path):
    made, text = key(path, tenant="acme", key_class="batch")
    admitted = admit(access(path, keys=True), text)
    assert (admitted.key_id, admitted.tenant, admitted.key_class) == (made.id, "acme", "batch")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_scheme_is_read_as_http_says(path, scheme):
    _, text = key(path)
    admit(access(path, keys=True), header=f"{scheme} {text} ")


def test_no_key_is_answered_as_openai_answers(path):
    error = refusal(access(path, keys=True))
    assert error.status == 401
    assert json.loads(error.body())["error"] == {
        "message": "You didn't provide an API key. Send it in the Authorization header, "
        "as 'Authorization: Bearer KEY'.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert error.headers["WWW-Authenticate"] == "Bearer"


def test_a_wrong_key_is_answered_as_openai_answers_and_not_repeated(path):
    key(path)
    shown = "sk-this-is-the-key-of-another-service"
    error = refusal(access(path, keys=True), shown=shown)
    assert error.status == 401
    values = json.loads(error.body())["error"]
    assert (values["type"], values["code"]) == ("invalid_request_error", "invalid_api_key")
    assert shown not in error.body().decode()


@pytest.mark.parametrize(
    "header",
    ["Bearer", "Bearer ", "Basic YTpi", "toolkit_x", "Bearer\tx", "Bearer " + "x" * 30_000],
)
def test_headers_that_are_no_bearer(path, header):
    assert refusal(access(path, keys=True), header=header).status == 401


def test_a_key_opens_the_models_it_was_made_for(path):
    _, text = key(path, models=("a", "b"))
    gate = access(path, keys=True)
    admitted = admit(gate, text, model="a")
    assert admitted.may("b")
    assert not admitted.may("c")
    error = refusal(gate, shown=text, model="c")
    assert (error.status, error.code, error.param) == (403, "model_not_found", "model")
    assert error.message == "This API key does not have access to model `c`."


# --- tokens


def test_a_token_lets_in_its_subject():
    admitted = admit(access(jwt=JWT), token(models=["a"]))
    assert (admitted.key_id, admitted.tenant, admitted.key_class) == ("jwt:alice", "alice", "jwt")
    assert admitted.may("a")
    assert not admitted.may("b")


def test_a_token_that_names_no_model_opens_none():
    gate = access(jwt=JWT)
    assert not admit(gate, token()).may("a")
    assert refusal(gate, shown=token(), model="a").status == 403


def test_a_key_is_no_token(path):
    _, text = key(path)
    assert refusal(access(jwt=JWT), shown=text).code == "invalid_api_key"


def test_keys_and_tokens_together(path):
    made, text = key(path)
    gate = access(path, keys=True, jwt=JWT)
    assert admit(gate, text).key_id == made.id
    assert admit(gate, token()).key_class == "jwt"
    for wrong in ("x", "toolkit_x", "a.b.c"):
        assert refusal(gate, shown=wrong).code == "invalid_api_key"


def test_a_token_is_no_key(path):
    key(path)
    assert refusal(access(path, keys=True), shown=token()).code == "invalid_api_key"


# --- limits


def test_a_key_has_its_own_limits_or_the_recipes(path):
    _, own = key(path, "own", requests_per_minute=5, tokens_per_minute=500)
    _, plain = key(path, "plain")
    gate = access(path, keys=True, limits={"requests_per_minute": 9, "max_n": 2})
    assert admit(gate, own).limits.requests_per_minute == 5
    assert admit(gate, own).limits.tokens_per_minute == 500
    assert admit(gate, own).limits.max_n == 2
    assert admit(gate, plain).limits.requests_per_minute == 9
    assert admit(gate, plain).limits.tokens_per_minute is None


def test_requests_beyond_the_limit_get_429_and_other_keys_do_not(path):
    made, first = key(path, "first")
    _, second = key(path, "second")
    gate = access(path, keys=True, limits={"requests_per_minute": 2})
    assert admit(gate, first).headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "30s",
    }
    admit(gate, first)
    error = refusal(gate, shown=first)
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert 29 <= int(error.headers["Retry-After"]) <= 30
    assert made.id in error.message
    admit(gate, second)


def test_wrong_keys_take_nothing_from_anyone(path):
    _, text = key(path)
    gate = access(path, keys=True, limits={"requests_per_minute": 1})
    for _ in range(20):
        refusal(gate, shown=text[:-1] + "!")
    admit(gate, text)


def test_tokens_are_reserved_and_settled(path):
    _, text = key(path, tokens_per_minute=1000)
    gate = access(path, keys=True)

    async def scenario():
        headers = {"authorization": f"Bearer {text}"}
        first = await gate.admit(headers, None)
        await first.reserve(900)
        assert first.headers["x-ratelimit-remaining-tokens"] == "100"
        second = await gate.admit(headers, None)
        with pytest.raises(ApiError) as caught:
            await second.reserve(200)
        assert (caught.value.type, caught.value.code) == ("tokens", "rate_limit_exceeded")
        await second.charge(0)
        await first.charge(300)  # 600 come back
        third = await gate.admit(headers, None)
        await third.reserve(650)

    asyncio.run(scenario())


def test_a_key_in_debt_is_refused_before_its_body_is_read(path):
    _, text = key(path, tokens_per_minute=100)
    gate = access(path, keys=True)

    async def scenario():
        headers = {"authorization": f"Bearer {text}"}
        first = await gate.admit(headers, None)
        await first.reserve(10)
        await first.charge(250)
        with pytest.raises(ApiError) as caught:
            await gate.admit(headers, None)
        assert caught.value.type == "tokens"
        assert 85 <= int(caught.value.headers["Retry-After"]) <= 90

    asyncio.run(scenario())


def test_subjects_of_tokens_are_limited_one_by_one():
    gate = access(jwt=JWT, limits={"requests_per_minute": 1})
    admit(gate, token("alice"))
    assert refusal(gate, shown=token("alice")).status == 429
    admit(gate, token("bob"))


def test_a_subject_cannot_use_up_the_limit_of_a_key(path):
    made, text = key(path)
    gate = access(path, keys=True, jwt=JWT, limits={"requests_per_minute": 1})
    admit(gate, token(made.id))
    admit(gate, text)


def test_closing_gives_back_what_is_held(path):
    key(path)
    asyncio.run(access(path, keys=True, jwt=JWT).close())
    asyncio.run(access().close())
