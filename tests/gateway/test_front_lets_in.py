"""Keys, tokens, limits and the cache through a real front, asked by the `openai` client and by hand."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jwt as pyjwt
import openai
import pytest

from tests.gateway.conftest import ROOT, start_front
from toolkit.gateway.keys import editing
from toolkit.gateway.settings import GatewaySettings
from toolkit.recipe.front import FrontSection

SECRET = "s" * 40


KEYS = {
    "whole": {},
    "scoped": {"models": ("tickets",)},
    "prometheus": {"models": ("/metrics",)},
    "batch": {"key_class": "batch"},
    "slow": {"requests_per_minute": 2},
    "metered": {"tokens_per_minute": 5000},
    "mine": {},
    "theirs": {},
    "leaver": {},
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The file, and the text of each key by name."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    with editing(path) as known:
        texts = {name: known.create(name, **fields)[1] for name, fields in KEYS.items()}
    return path, texts


@pytest.fixture(scope="module")
def front(upstream, keys):
    """A front that asks for keys or tokens, and keeps answers."""
    section = FrontSection(
        keys=True,
        jwt={"issuer": "i", "audience": "a", "secret_env": "FRONT_SECRET"},
        cache={},
    )
    with tempfile.TemporaryDirectory(prefix="front-") as folder:
        started = start_front(
            Path(folder),
            upstream,
            front=section,
            keys_file=keys[0],
            environ={"FRONT_SECRET": SECRET},
        )
        yield started
        started.stop()


@pytest.fixture
def key(keys):
    """The text of a key by its name."""
    return keys[1].__getitem__


def token(**more):
    values = {"iss": "i", "aud": "a", "sub": "alice", "exp": time.time() + 60, "models": "*"} | more
    return pyjwt.encode(values, SECRET, "HS256")


def bearer(text):
    return {"authorization": f"Bearer {text}"}


@pytest.fixture
def client(front):
    """Clients by their key, closed at the end."""
    made = []

    def client(text):
        made.append(openai.OpenAI(base_url=f"{front.url}/v1", api_key=text, max_retries=0))
        return made[-1]

    yield client
    for one in made:
        one.close()


@pytest.fixture
def say(client):
    """Asks one question."""

    def say(text, model="tickets", **more):
        messages = [{"role": "user", "content": "hi"}]
        return client(text).chat.completions.create(model=model, messages=messages, **more)

    return say


def test_nobody_gets_in_without_a_key_and_health_stays_open(front):
    for method, path in (
        ("GET", "/v1/models"), ("GET", "/v1/models/tickets"), ("GET", "/metrics"), ("GET", "/toolkit/certificate"),
        ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/embeddings"),
    ):  # fmt: skip
        status, headers, answer = front.ask(method, path, {} if method == "POST" else None)
        assert status == 401, path
        assert headers["www-authenticate"] == "Bearer"
        assert json.loads(answer)["error"]["type"] == "invalid_request_error"
    assert front.ask("GET", "/healthz")[0] == 200
    assert front.ask("GET", "/readyz")[0] == 200


def test_the_openai_client_raises_what_its_users_expect(key, say):
    assert say(key("scoped")).choices
    with pytest.raises(openai.AuthenticationError) as caught:
        say("sk-wrong")
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError) as denied:
        say(key("scoped"), model="demo-base")
    assert denied.value.code == "model_not_found"


def test_a_model_outside_the_scope_and_one_that_does_not_exist_are_answered_alike(key, say):
    messages = []
    for model in ("demo-base", "not-there"):
        with pytest.raises(openai.PermissionDeniedError) as denied:
            say(key("scoped"), model=model)
        messages.append(denied.value.message.replace(model, "MODEL"))
    assert messages[0] == messages[1]


def test_a_key_lists_the_models_it_may_ask(key, client):
    assert [m.id for m in client(key("scoped")).models.list()] == ["tickets"]
    assert len(list(client(token()).models.list())) == 3
    assert list(client(token(models=[])).models.list()) == []


def test_a_model_that_a_key_may_not_ask_is_as_unknown_as_one_that_does_not_exist(key, client):
    scoped = client(key("scoped"))
    assert scoped.models.retrieve("tickets").id == "tickets"
    messages = []
    for model in ("demo-base", "not-there"):
        with pytest.raises(openai.NotFoundError) as unknown:
            scoped.models.retrieve(model)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        messages.append(unknown.value.message.replace(model, "MODEL"))
    assert messages[0] == messages[1]
    assert client(token()).models.retrieve("demo-base").id == "demo-base"


def test_tokens_work_beside_keys(front, say):
    assert say(token(sub="bob")).choices
    with pytest.raises(openai.PermissionDeniedError):
        say(token(models=["other"]))
    with pytest.raises(openai.AuthenticationError, match="The token has expired"):
        say(token(exp=time.time() - 60))
    line = front.wait_for(lambda: next((x for x in front.log() if x["tenant"] == "bob"), None))
    assert line["key_id"] == "jwt:bob"


def test_a_revoked_key_is_out_of_a_running_front_within_two_seconds(key, keys, say):
    say(key("leaver"))
    with editing(keys[0]) as known:
        known.revoke("leaver")
        _, new = known.create("joiner")
    time.sleep(1.1)
    with pytest.raises(openai.AuthenticationError, match="is revoked"):
        say(key("leaver"))
    assert say(new).choices


def test_the_limit_is_told_in_headers_and_then_enforced(key, client, say):
    answer = client(key("slow")).chat.completions.with_raw_response.create(
        model="tickets", messages=[{"role": "user", "content": "hi"}]
    )
    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    say(key("slow"))
    with pytest.raises(openai.RateLimitError) as caught:
        say(key("slow"))
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
    assert say(key("whole")).choices


def test_tokens_are_settled_by_what_the_engine_counted(key, client, say):
    ask = client(key("metered")).chat.completions.with_raw_response.create
    said = {"model": "tickets", "messages": [{"role": "user", "content": "hi"}]}
    first = ask(**said)  # states no max_tokens: taken for 256 and the prompt
    used = json.loads(first.text)["usage"]["total_tokens"]
    assert used < 100
    reserved = 5000 - int(first.headers["x-ratelimit-remaining-tokens"])
    assert reserved > 256
    second = ask(**said)
    taken = 5000 - int(second.headers["x-ratelimit-remaining-tokens"])
    assert taken <= reserved + used + 1  # what the first did not use came back
    with pytest.raises(openai.RateLimitError, match="Request too large"):
        say(key("metered"), max_tokens=1000, n=8)


def test_metrics_are_for_keys_that_open_everything_or_were_made_for_them(front, key, say):
    assert front.ask("GET", "/metrics", **bearer(key("whole")))[0] == 200
    status, _, answer = front.ask("GET", "/metrics", **bearer(key("scoped")))
    assert status == 403
    assert "--metrics-only" in json.loads(answer)["error"]["message"]
    assert front.ask("GET", "/metrics", **bearer(key("prometheus")))[0] == 200
    assert json.loads(front.ask("GET", "/v1/models", **bearer(key("prometheus")))[2])["data"] == []
    with pytest.raises(openai.PermissionDeniedError):
        say(key("prometheus"))


def test_metrics_tell_classes_of_keys_apart(front, key, say):
    say(key("batch"))
    shown = front.ask("GET", "/metrics", **bearer(key("whole")))[2].decode()
    ours = 'toolkit_requests_total{key="batch",model="tickets",status="200",target="stable"} 1.0'
    assert ours in shown
    assert key("batch") not in shown


def test_no_key_and_no_token_is_ever_written_down(front, key, say):
    shown = token(sub="carol")
    say(key("whole"))
    say(shown)
    for wrong in ("sk-of-somebody-else", key("whole")[:-1] + "-", shown[:-2]):
        front.ask("POST", "/v1/chat/completions", {}, **bearer(wrong))
    front.wait_for(lambda: any(line["tenant"] == "carol" for line in front.log()))
    written = (front.folder / "access.jsonl").read_text()
    for secret in (key("whole"), shown, "sk-of-somebody-else", key("whole").split("_")[2]):
        assert secret not in written


def test_a_repeated_deterministic_request_is_answered_from_the_cache_of_its_tenant(front, key):
    messages = [{"role": "user", "content": "cache me"}]
    body = {"model": "tickets", "messages": messages, "temperature": 0}

    def ask(name, **more):
        path, headers = "/v1/chat/completions", bearer(key(name))
        status, headers, answer = front.ask("POST", path, body | more, **headers)
        assert status == 200
        return headers.get("x-toolkit-cache"), answer

    first = ask("mine")
    assert first[0] == "miss"
    assert ask("mine", user="u1") == ("hit", first[1])
    assert ask("theirs")[0] == "miss"
    assert ask("mine", seed=3)[0] == "miss"
    assert ask("mine", temperature=1)[0] is None
    assert ask("mine", stream=True)[0] is None
    front.put(replace(front.table, certificate={"proofs": "new"}))
    assert ask("mine")[0] == "miss"


def refused_start(tmp_path, **settings):
    """What a front says that does not start."""
    given = GatewaySettings(name="x", port=0, control=tmp_path / "c", **settings)
    (tmp_path / "s.json").write_text(given.model_dump_json())
    command = [sys.executable, "-m", "toolkit.gateway", str(tmp_path / "s.json")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    return done.stderr


def test_a_front_without_keys_does_not_start_beyond_loopback(tmp_path):
    said = refused_start(tmp_path, host="0.0.0.0")
    assert (
        "error: serve.host is '0.0.0.0' (every interface), and the front lets everyone in" in said
    )
    assert "toolkit keys create NAME" in said


def test_a_key_file_that_others_may_read_stops_the_start(tmp_path):
    path = tmp_path / "keys.json"
    with editing(path) as known:
        known.create("app")
    path.chmod(0o644)
    said = refused_start(tmp_path, front=FrontSection(keys=True), keys_file=path)
    assert f"error: {path} is open to others (mode 0644)" in said
    assert f"chmod 600 {path}" in said
