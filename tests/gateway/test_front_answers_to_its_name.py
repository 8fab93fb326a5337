"""A front that asks for no key, and the pages that a browser of its machine shows: DNS rebinding, foreign origins."""

import json

import pytest
from pydantic import ValidationError

from tests.gateway.conftest import request
from toolkit.gateway.callers import Callers
from toolkit.gateway.openai import ApiError
from toolkit.recipe.front import AllowSection, FrontSection

BODY = {"model": "tickets", "messages": [{"role": "user", "content": "hi"}]}
CHAT = ("POST", "/v1/chat/completions")
JWT = {"issuer": "i", "audience": "a", "secret_env": "S"}


def refused(front: FrontSection, **headers: str) -> str | None:
    """The code of the refusal."""
    try:
        Callers(front).check(headers)
    except ApiError as error:
        return error.code
    return None


def allowing(**allow: list[str]) -> FrontSection:
    return FrontSection(allow=AllowSection(**allow))


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "localhost.:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:80", "a.localhost"],
)  # fmt: skip
def test_names_of_this_machine(host):
    assert refused(FrontSection(), host=host) is None
    assert refused(FrontSection(), host="localhost", origin=f"http://{host}") is None


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evillocalhost",
     "10.0.0.5", "0.0.0.0", "[::2]", "localhost@evil.example", "", ":8000", "[", "a b", "http://localhost"],
)  # fmt: skip
def test_names_of_elsewhere(host):
    assert refused(FrontSection(), host=host) == "host_not_allowed"
    assert (
        refused(FrontSection(), host="localhost", origin=f"http://{host}") == "origin_not_allowed"
    )


@pytest.mark.parametrize(
    "origin", ["null", "file://", "chrome-extension://abc", "https://evil.example"]
)
def test_origins_that_are_no_page_of_this_machine(origin):
    assert refused(FrontSection(), host="localhost", origin=origin) == "origin_not_allowed"


def test_a_program_sends_no_origin_and_may_send_no_host():
    assert refused(FrontSection()) is None


@pytest.mark.parametrize("front", [FrontSection(keys=True), FrontSection(jwt=JWT)])
def test_no_page_has_a_key(front):
    assert refused(front, host="llm.example.com", origin="https://app.example.com") is None


def test_a_recipe_names_who_may_call():
    front = allowing(hosts=["LLM.example.com"], origins=["https://App.example.com/"])
    assert refused(front, host="llm.example.com:443") is None
    assert refused(front, host="localhost", origin="https://app.example.com") is None
    assert (
        refused(front, host="localhost", origin="https://llm.example.com") is None
    )  # its own page
    assert refused(front, host="localhost", origin="http://app.example.com") == "origin_not_allowed"
    assert refused(front, host="other.example.com") == "host_not_allowed"
    everyone = allowing(hosts=["*"], origins=["*"])
    assert refused(everyone, host="evil.example", origin="null") is None


def test_names_are_checked_beside_keys_where_they_are_given():
    front = FrontSection(keys=True, allow=AllowSection(hosts=["llm.example.com"]))
    assert refused(front, host="evil.example") == "host_not_allowed"
    assert refused(front, host="llm.example.com", origin="https://evil.example") is None


@pytest.mark.parametrize(
    ("allow", "says"),
    [
        ({"hosts": ["https://llm.example.com"]}, "write llm.example.com, without scheme and port"),
        ({"hosts": ["llm.example.com:8000"]}, "without scheme and port"),
        ({"hosts": [""]}, "is not a name"),
        ({"origins": ["app.example.com"]}, "write https://app.example.com"),
        ({"origins": ["https://app.example.com/page"]}, "is not an origin"),
        ({"origins": ["null"]}, "is not an origin"),
    ],
)
def test_a_recipe_that_names_no_name(allow, says):
    with pytest.raises(ValidationError, match=says):
        AllowSection(**allow)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/tickets", "/metrics", "/toolkit/certificate", "/nowhere"]
)
def test_a_rebound_page_reads_nothing(front, path):
    status, headers, body = request("GET", front.port, path, None, {"Host": "evil.example:80"})
    assert status == 403
    assert json.loads(body)["error"] == {
        "message": "This server does not answer to the name 'evil.example:80'. Ask it as localhost or 127.0.0.1, or "
        "name the host in serve.front.allow.hosts: without keys it answers to the names of its own machine alone.",
        "type": "invalid_request_error",
        "param": None,
        "code": "host_not_allowed",
    }
    assert headers["x-request-id"]


def test_a_foreign_page_does_not_reach_the_engine(front, upstream):
    before = len(upstream.ask("/seen")["seen"])
    # as a form of a page sends it, without asking first
    headers = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    status, _, body = request(*CHAT[:1], front.port, CHAT[1], BODY, headers)
    assert (status, json.loads(body)["error"]["code"]) == (403, "origin_not_allowed")
    assert "serve.front.allow.origins" in json.loads(body)["error"]["message"]
    assert len(upstream.ask("/seen")["seen"]) == before
    assert front.ask("GET", "/metrics")[2].decode().count('code="origin_not_allowed"') >= 1


def test_a_page_of_this_machine_is_answered(front):
    headers = {"Origin": "http://localhost:3000"}
    assert request(*CHAT[:1], front.port, CHAT[1], BODY, headers)[0] == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/openapi.json"])
def test_probes_need_no_name(front, path):
    assert request("GET", front.port, path, None, {"Host": "10.1.2.3:8000"})[0] == 200
