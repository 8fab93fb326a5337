"""Tokens: what is let in, what hostile ones try, and how keys are rotated at a real HTTP server."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jwt as pyjwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import ToolkitError
from toolkit.gateway import jwks
from toolkit.gateway.jwks import KeySet, KeySetFile, KeySetUrl, Secret, refuse_unsafe_url
from toolkit.gateway.jwt import Tokens
from toolkit.gateway.openai import ApiError
from toolkit.recipe.front import FrontSection, JwtSection

ISSUER, AUDIENCE = "https://id.example.com", "toolkit"
SECRET = "s" * 32
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
RSA_2 = rsa.generate_private_key(public_exponent=65537, key_size=2048)
P256 = ec.generate_private_key(ec.SECP256R1())
P384 = ec.generate_private_key(ec.SECP384R1())
ED = ed25519.Ed25519PrivateKey.generate()


def jwk(key, kid="k1", **more):
    name = {"RSAPrivateKey": "RS256", "Ed25519PrivateKey": "EdDSA"}.get(
        type(key).__name__.lstrip("_")
    )
    algorithm = pyjwt.get_algorithm_by_name(name or "ES256")
    values = json.loads(algorithm.to_jwk(key.public_key()))
    values.pop("key_ops", None)
    return values | {"kid": kid} | more


def key_set(*keys):
    return json.dumps({"keys": list(keys)})


def claims(**changes):
    now = int(time.time())
    values = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "alice",
        "exp": now + 60,
        "models": ["tickets"],
    }
    return {k: v for k, v in (values | changes).items() if v is not None}


def sign(key=RSA, algorithm="RS256", kid="k1", headers=(), **changes):
    extra = dict(headers) | ({"kid": kid} if kid else {})
    return pyjwt.encode(claims(**changes), key, algorithm, headers=extra)


def b64(data):
    data = json.dumps(data).encode() if isinstance(data, dict) else data
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forge(header, payload, signature=b""):
    return f"{b64(header)}.{b64(payload)}.{b64(signature)}"


def tokens_of(tmp_path, *keys, **section):
    file = tmp_path / "jwks.json"
    file.write_text(key_set(*keys))
    return Tokens(JwtSection(issuer=ISSUER, audience=AUDIENCE, jwks=str(file), **section))


def check(tokens, token):
    return asyncio.run(tokens.check(token))


def refusal(tokens, token):
    with pytest.raises(ApiError) as caught:
        check(tokens, token)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.headers["WWW-Authenticate"].startswith("Bearer")
    return caught.value.message


@pytest.fixture
def tokens(tmp_path):
    return tokens_of(tmp_path, jwk(RSA))


@pytest.fixture
def secret_tokens():
    section = JwtSection(issuer=ISSUER, audience=AUDIENCE, secret_env="SECRET")
    return Tokens(section, {"SECRET": SECRET})


# --- what is let in


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (RSA, "RS256"),
        (RSA, "RS512"),
        (RSA, "PS256"),
        (P256, "ES256"),
        (P384, "ES384"),
        (ED, "EdDSA"),
    ],
)
def test_algorithms_of_published_keys(tmp_path, key, algorithm):
    found = jwk(key)
    if key is P384:
        found = json.loads(pyjwt.get_algorithm_by_name("ES384").to_jwk(P384.public_key())) | {
            "kid": "k1"
        }
    assert check(tokens_of(tmp_path, found), sign(key, algorithm))["sub"] == "alice"


def test_hs256_with_a_secret(secret_tokens):
    assert check(secret_tokens, sign(SECRET, "HS256", kid=None))["sub"] == "alice"


def test_several_keys_are_told_apart_by_their_id(tmp_path):
    tokens = tokens_of(tmp_path, jwk(RSA, "a"), jwk(P256, "b"), jwk(RSA_2, "c"))
    for key, algorithm, kid in ((RSA, "RS256", "a"), (P256, "ES256", "b"), (RSA_2, "RS256", "c")):
        check(tokens, sign(key, algorithm, kid))
    assert "signature is wrong" in refusal(tokens, sign(RSA, "RS256", "c"))


def test_a_token_without_key_id_is_taken_where_there_is_one_key_only(tmp_path):
    check(tokens_of(tmp_path, jwk(RSA)), sign(kid=None))
    two = tokens_of(tmp_path, jwk(RSA, "a"), jwk(RSA_2, "b"))
    assert "key and algorithm" in refusal(two, sign(kid=None))


def test_the_audience_may_be_one_of_a_list(tokens):
    check(tokens, sign(aud=["other", AUDIENCE]))


def test_clocks_may_differ_by_a_few_seconds(tokens):
    now = int(time.time())
    check(tokens, sign(exp=now - 5))
    check(tokens, sign(nbf=now + 5))


# --- what is not


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exp": int(time.time()) - 60}, "The token has expired."),
        ({"nbf": int(time.time()) + 600}, "not valid yet"),
        ({"aud": "other"}, "another audience (`aud`)"),
        ({"aud": ["other"]}, "another audience (`aud`)"),
        ({"iss": "https://evil.example.com"}, "another issuer (`iss`)"),
        ({"iss": ISSUER + "/"}, "another issuer (`iss`)"),
        ({"exp": None}, 'The token lacks the "exp" claim.'),
        ({"aud": None}, 'The token lacks the "aud" claim.'),
        ({"iss": None}, 'The token lacks the "iss" claim.'),
        ({"sub": None}, 'The token lacks the "sub" claim.'),
        ({"sub": ""}, "must have 1 to 256 characters"),
        ({"sub": "x" * 257}, "must have 1 to 256 characters"),
        ({"exp": "soon"}, "The token is not valid."),
    ],
)
def test_claims_that_are_wrong(tokens, changes, says):
    assert says in refusal(tokens, sign(**changes))


def test_a_subject_that_is_no_text(tokens):
    token = forge({"alg": "RS256", "kid": "k1"}, claims(sub=7))
    body = token.rpartition(".")[0]
    signature = pyjwt.get_algorithm_by_name("RS256").sign(body.encode(), RSA)
    assert refusal(tokens, f"{body}.{b64(signature)}") == "The token is not valid."


def test_alg_none_is_refused(tokens, secret_tokens):
    for algorithm in ("none", "None", "NONE", "nOnE", ""):
        for signature in (b"", b"x"):
            token = forge({"alg": algorithm, "kid": "k1"}, claims(), signature)
            refusal(tokens, token)
            refusal(secret_tokens, token)


def test_a_public_key_is_no_hmac_secret(tokens):
    """Key confusion: the attacker signs with HS256 and what everyone knows, the public key."""
    pem = RSA.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for public in (pem, json.dumps(jwk(RSA)).encode(), pem.strip()):
        head = f"{b64({'alg': 'HS256', 'kid': 'k1'})}.{b64(claims())}"
        signature = hmac.new(public, head.encode(), hashlib.sha256).digest()
        assert "key and algorithm" in refusal(tokens, f"{head}.{b64(signature)}")


def test_rsa_tokens_do_not_pass_where_a_secret_is_configured(secret_tokens):
    assert "key and algorithm" in refusal(secret_tokens, sign())


def test_other_hmac_lengths_do_not_pass_where_hs256_is_configured(secret_tokens):
    assert "key and algorithm" in refusal(secret_tokens, sign("s" * 64, "HS512"))


def test_an_algorithm_that_the_key_is_not_published_for(tmp_path):
    tokens = tokens_of(tmp_path, jwk(RSA, alg="RS256"))
    check(tokens, sign())
    assert "key and algorithm" in refusal(tokens, sign(RSA, "PS256"))


def test_keys_that_a_token_brings_along_are_never_used(tokens):
    own = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for header in (
        {"jwk": jwk(own)},
        {"jku": "http://127.0.0.1:9/jwks.json"},
        {"x5u": "http://127.0.0.1:9/cert.pem"},
        {"x5c": ["AAAA"]},
    ):
        assert "signature is wrong" in refusal(tokens, sign(own, headers=header))
        assert "key and algorithm" in refusal(tokens, sign(own, kid="other", headers=header))


@pytest.mark.parametrize(
    "kid",
    [
        "../../etc/passwd",
        "/dev/null",
        "k1\x00",
        "' OR 1=1 --",
        "http://127.0.0.1/",
        "k1/../k1",
        "x" * 5000,
    ],
)
def test_a_key_id_is_a_name_and_leads_to_no_file(tokens, kid):
    assert "key and algorithm" in refusal(tokens, sign(kid=kid))


@pytest.mark.parametrize("kid", [7, None, ["k1"], {"k1": 1}])
def test_a_key_id_that_is_no_text(tokens, kid):
    refusal(tokens, forge({"alg": "RS256", "kid": kid}, claims(), b"x"))


def test_unknown_critical_extensions_are_refused(tokens):
    for header in ({"crit": ["exp"]}, {"crit": []}, {"b64": False, "crit": ["b64"]}):
        token = forge({"alg": "RS256", "kid": "k1"} | header, claims(), b"x")
        refusal(tokens, token)


def test_a_changed_payload_is_noticed(tokens):
    head, _, signature = sign().split(".")
    assert "signature is wrong" in refusal(tokens, f"{head}.{b64(claims(models='*'))}.{signature}")


def test_an_oversized_token_is_refused_before_it_is_read(tokens, monkeypatch):
    monkeypatch.setattr(pyjwt, "get_unverified_header", lambda _: pytest.fail("it was read"))
    assert "not a signed" in refusal(tokens, sign(extra="x" * 20_000))


@pytest.mark.parametrize(
    "token",
    [
        "",
        "x",
        "a.b",
        "a.b.c",
        "a.b.c.d",
        "a.b.c.d.e",
        "..",
        "e30.e30.",
        "W10.e30.eA",
        "a.b.c\n",
        "ä.b.c",
        "e30=.e30=.eA==",
    ],
)
def test_what_is_no_token(tokens, token):
    refusal(tokens, token)


@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=60))
def test_random_bytes_are_refused_and_never_an_exception(a, b, c):
    section = JwtSection(issuer=ISSUER, audience=AUDIENCE, secret_env="SECRET")
    refusal(Tokens(section, {"SECRET": SECRET}), f"{b64(a)}.{b64(b)}.{b64(c)}")


def test_deeply_nested_json_is_refused(tokens):
    deep = ("[" * 3000 + "]" * 3000).encode()
    refusal(tokens, forge(b'{"alg":"RS256","kid":' + deep + b"}", claims(), b"x"))


# --- models


@pytest.mark.parametrize(
    ("found", "models"),
    [
        ({"models": ["a", "b"]}, {"a", "b"}),
        ({"models": "a b"}, {"a", "b"}),
        ({"models": "*"}, None),
        ({"models": ["a", "*"]}, None),
        ({}, set()),
        ({"models": []}, set()),
        ({"models": {"a": 1}}, set()),
        ({"models": ["a", 7, None]}, {"a"}),
        ({"scope": "openid model:a model:b"}, {"a", "b"}),
        ({"scope": "openid profile"}, set()),
        ({"scope": "model:*"}, None),
        ({"scope": "*"}, set()),
        ({"scp": ["model:a"]}, {"a"}),
        ({"models": ["a"], "scope": "model:b"}, {"a", "b"}),
    ],
)
def test_models_of_a_token(tokens, found, models):
    assert tokens.models(found) == models


def test_another_claim_may_hold_the_models(tmp_path):
    tokens = tokens_of(tmp_path, jwk(RSA), models_claim="https://example.com/models")
    assert tokens.models({"https://example.com/models": ["a"], "models": ["b"]}) == {"a"}


# --- keys


@pytest.mark.parametrize("secret", ["", "x" * 31, "ä" * 15])
def test_a_short_secret_is_refused(secret):
    with pytest.raises(
        ToolkitError, match=r"\$S holds \d+ bytes, and a secret for HS256 needs 32"
    ) as caught:
        Secret(secret, "S")
    assert caught.value.hint == "make one: openssl rand -hex 32"


def test_a_public_key_as_secret_is_refused():
    with pytest.raises(ToolkitError, match="holds a public or private key, not a secret"):
        Secret("-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIB", "S")


def test_a_secret_that_is_not_set():
    section = JwtSection(issuer=ISSUER, audience=AUDIENCE, secret_env="NOT_THERE")
    with pytest.raises(ToolkitError, match=r"names \$NOT_THERE, which is not set") as caught:
        Tokens(section, {})
    assert caught.value.hint == "export NOT_THERE=$(openssl rand -hex 32)"


@pytest.mark.parametrize(
    "more",
    [
        {"use": "enc"},
        {"key_ops": ["encrypt"]},
        {"alg": "HS256"},
        {"alg": "none"},
        {"kty": "oct"},
        {"n": "AQAB"},
        {"n": 7},
        {"n": None},
        {"n": ["AQAB"]},
        {"e": {}},
        {"kty": ["RSA"]},
        {"kty": None},
        {"crv": []},
        {"crv": {}},
        {"use": 5},
        {"use": ["sig"]},
        {"key_ops": 5},
        {"key_ops": "verify"},
        {"key_ops": {"verify": 1}},
        {"alg": 256},
        {"alg": ["RS256"]},
    ],
)
def test_keys_that_cannot_verify_are_left_out(more):
    with pytest.raises(ValueError, match="none of its keys can verify a token"):
        KeySet.parse(key_set(jwk(RSA) | more))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = st.sampled_from(["kty", "use", "key_ops", "alg", "kid", "crv", "n", "e", "x", "y", "d"])


@given(st.dictionaries(FIELDS, JSON, max_size=3), st.sampled_from([RSA, P256, ED]))
def test_a_key_of_odd_types_is_left_out_and_the_others_are_read(odd, key):
    found = KeySet.parse(key_set(jwk(key, "odd") | odd, jwk(RSA_2, "good")))
    assert found.find("good", "RS256") is not None


@given(JSON)
def test_odd_json_is_no_key_set(values):
    for text in (json.dumps(values), json.dumps({"keys": values})):
        with pytest.raises(ValueError, match=r"no list|none of its keys"):
            KeySet.parse(text)


@given(st.sampled_from(["exp", "nbf", "iat", "iss", "aud", "sub", "models", "scope"]), JSON)
def test_a_signed_claim_of_an_odd_type_is_refused_or_means_nothing(name, value):
    payload = json.dumps(claims() | {name: value}).encode()
    token = pyjwt.api_jws.PyJWS().encode(payload, SECRET.encode(), "HS256")
    section = JwtSection(issuer=ISSUER, audience=AUDIENCE, secret_env="SECRET")
    tokens = Tokens(section, {"SECRET": SECRET})
    with contextlib.suppress(ApiError):  # any other exception fails
        tokens.models(check(tokens, token))


def test_a_shared_secret_in_a_key_set_is_left_out():
    oct_key = {"kty": "oct", "k": b64(b"s" * 32), "kid": "k1", "alg": "HS256"}
    assert KeySet.parse(key_set(oct_key, jwk(RSA, "k2"))).find("k1", "HS256") is None


def test_a_weak_rsa_key_is_left_out():
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    with pytest.raises(ValueError, match="RSA of 2048 bits"):
        KeySet.parse(key_set(jwk(weak)))


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "7", "null", '"keys"', '{"keys": {}}', '{"keys": []}', '{"keys": [7]}'),
        *(
            '{"keys": [{}]}',
            '{"keys": null}',
            '{"keys": "RSA"}',
            '{"keys": 1e400}',
            '{"keys": [[]]}',
        ),
        pytest.param('{"keys":' * 50_000, id="deep"),
        pytest.param('{"keys": [%s]}' % ("9" * 5000), id="a long number"),
    ],
)
def test_what_is_no_key_set(tmp_path, text):
    file = tmp_path / "jwks.json"
    file.write_text(text)
    with pytest.raises(ToolkitError, match="is not a set of keys"):
        KeySetFile(file)


@pytest.mark.parametrize(
    "url",
    [
        "https://id.example.com/jwks",
        "http://127.0.0.1:8080/jwks",
        "http://localhost/jwks",
        "http://[::1]/jwks",
    ],
)
def test_urls_that_keys_may_come_from(url):
    refuse_unsafe_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://id.example.com/jwks",
        "http://10.0.0.1/jwks",
        "ftp://localhost/jwks",
        "file:///etc/jwks",
        "https://",
        "http://localhost.evil.com/",
        "http://127.0.0.1@evil.com/",
    ],
)
def test_urls_that_keys_may_not_come_from(url):
    with pytest.raises(ToolkitError, match="keys are fetched over https") as caught:
        KeySetUrl(url)
    assert caught.value.hint == "give the provider's https URL, or a file"


def test_a_recipe_gives_one_kind_of_key():
    for wrong in ({}, {"jwks": "a", "secret_env": "B"}):
        with pytest.raises(ValueError, match="give either `jwks`"):
            JwtSection(issuer=ISSUER, audience=AUDIENCE, **wrong)


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("keys.json", "/recipes/keys.json"),
        ("/etc/keys.json", "/etc/keys.json"),
        ("https://id.example.com/jwks", "https://id.example.com/jwks"),
    ],
)
def test_a_key_file_is_named_from_where_the_recipe_lies(named, found):
    front = FrontSection(jwt={"issuer": ISSUER, "audience": AUDIENCE, "jwks": named})
    assert front.beside(Path("/recipes")).jwt.jwks == found


def test_a_front_without_key_files_stays_as_it_is():
    front = FrontSection(jwt={"issuer": ISSUER, "audience": AUDIENCE, "secret_env": "S"})
    assert front.beside(Path("/recipes")) is front
    assert FrontSection().beside(Path("/recipes")) == FrontSection()


def test_a_key_file_is_read_again_when_it_changes_and_kept_when_it_breaks(tmp_path, caplog):
    file = tmp_path / "jwks.json"
    file.write_text(key_set(jwk(RSA, "a")))
    clock = Clock()
    source = KeySetFile(file, clock)

    def find(kid):
        return asyncio.run(source.find(kid, "RS256"))

    file.write_text(key_set(jwk(RSA_2, "new")))
    assert find("new") is None  # not looked yet
    clock.now += 1
    assert find("new") is not None
    assert find("a") is None
    file.write_text("{")
    clock.now += 1
    assert find("new") is not None
    assert "the keys of before stay" in caplog.text


# --- rotation, against a real server


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Provider:
    """An identity provider's key URL."""

    def __init__(self):
        self.body, self.status, self.headers, self.asked, self.wait_s = b"", 200, {}, 0, 0.0
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                provider.asked += 1
                time.sleep(provider.wait_s)
                self.send_response(200 if self.path == "/elsewhere" else provider.status)
                for name, value in provider.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(provider.body)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(provider.body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def publish(self, *keys):
        self.body, self.status = key_set(*keys).encode(), 200

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/jwks"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def provider():
    provider = Provider()
    yield provider
    provider.close()


def with_source(provider, scenario, clock=None):
    """Run ``scenario(source, clock)`` in an event loop."""
    clock = clock or Clock()

    async def run():
        source = KeySetUrl(provider.url, clock)
        try:
            return await scenario(source, clock)
        finally:
            await source.close()

    return asyncio.run(run())


def test_keys_are_fetched_once_and_kept(provider):
    provider.publish(jwk(RSA, "a"))

    async def scenario(source, clock):
        for _ in range(20):
            assert await source.find("a", "RS256") is not None
            clock.now += 10

    with_source(provider, scenario)
    assert provider.asked == 1


def test_a_new_key_is_found_by_its_unknown_id(provider):
    provider.publish(jwk(RSA, "old"))

    async def scenario(source, clock):
        assert await source.find("old", "RS256") is not None
        provider.publish(jwk(RSA, "old"), jwk(RSA_2, "new"))
        clock.now += 5
        assert await source.find("new", "RS256") is not None
        provider.publish(jwk(RSA_2, "new"))
        clock.now += 5
        assert await source.find("unknown", "RS256") is None
        assert await source.find("old", "RS256") is None

    with_source(provider, scenario)
    assert provider.asked == 3


def test_a_flood_of_unknown_ids_asks_the_provider_at_most_every_five_seconds(provider):
    provider.publish(jwk(RSA, "a"))

    async def scenario(source, clock):
        await source.find("a", "RS256")
        for second in range(10):
            clock.now += 1
            found = await asyncio.gather(
                *(source.find(f"{second}-{i}", "RS256") for i in range(50))
            )
            assert found == [None] * 50

    with_source(provider, scenario)
    assert provider.asked == 3


def test_many_first_requests_fetch_once(provider):
    provider.publish(jwk(RSA, "a"))
    provider.wait_s = 0.05

    async def scenario(source, clock):
        found = await asyncio.gather(*(source.find("a", "RS256") for _ in range(50)))
        assert None not in found

    with_source(provider, scenario)
    assert provider.asked == 1


@pytest.mark.parametrize("outage", ["status", "garbage", "odd", "gone", "redirect", "huge"])
def test_stale_keys_are_kept_while_the_provider_is_down(provider, outage, caplog):
    provider.publish(jwk(RSA, "a"))

    async def scenario(source, clock):
        await source.find("a", "RS256")
        if outage == "status":
            provider.status = 500
        elif outage == "garbage":
            provider.body = b"<html>"
        elif outage == "odd":
            provider.body = key_set(jwk(RSA, "a") | {"key_ops": 7, "crv": []}).encode()
        elif outage == "redirect":
            provider.status, provider.headers = 302, {"Location": provider.url + "2"}
        elif outage == "huge":
            provider.body = b" " * (jwks.LARGEST_SET_BYTES + 1) + key_set(jwk(RSA_2, "b")).encode()
        else:
            source._url = "http://127.0.0.1:9/jwks"
        clock.now += 3600
        assert await source.find("a", "RS256") is not None
        await source._background
        assert await source.find("a", "RS256") is not None
        clock.now += 5
        assert await source.find("b", "RS256") is None

    with_source(provider, scenario)
    assert "those of before stay" in caplog.text


def test_a_redirect_is_not_followed(provider):
    """It could lead to a server that is not the issuer's, or off https."""
    provider.publish(jwk(RSA, "a"))
    provider.status, provider.headers = 302, {"Location": "/elsewhere"}

    async def scenario(source, clock):
        with pytest.raises(ApiError):
            await source.find("a", "RS256")

    with_source(provider, scenario)
    assert provider.asked == 1


def test_a_key_that_is_withdrawn_ends_within_ten_minutes(provider):
    provider.publish(jwk(RSA, "a"), jwk(RSA_2, "b"))

    async def scenario(source, clock):
        await source.find("a", "RS256")
        provider.publish(jwk(RSA_2, "b"))
        clock.now += 600
        await source.find("a", "RS256")  # starts the fetch, does not wait for it
        await source._background
        assert await source.find("a", "RS256") is None

    with_source(provider, scenario)


def test_without_any_key_yet_the_answer_is_503_and_not_wrong_key(provider):
    provider.status = 500

    async def scenario(source, clock):
        with pytest.raises(ApiError) as caught:
            await source.find("a", "RS256")
        assert caught.value.status == 503
        assert caught.value.headers["Retry-After"] == "5"
        provider.publish(jwk(RSA, "a"))
        clock.now += 5
        assert await source.find("a", "RS256") is not None

    with_source(provider, scenario)


def test_a_provider_that_hangs_is_given_up(provider, monkeypatch):
    monkeypatch.setattr(jwks, "FETCH_TIMEOUT_S", 0.1)
    provider.publish(jwk(RSA, "a"))
    provider.wait_s = 1.0

    async def scenario(source, clock):
        with pytest.raises(ApiError):
            await source.find("a", "RS256")

    with_source(provider, scenario)


def test_a_token_is_checked_against_the_url(provider):
    provider.publish(jwk(RSA))

    async def run():
        tokens = Tokens(JwtSection(issuer=ISSUER, audience=AUDIENCE, jwks=provider.url))
        try:
            return await tokens.check(sign())
        finally:
            await tokens.close()

    assert asyncio.run(run())["sub"] == "alice"
