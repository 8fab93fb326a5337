"""Hostile clients: other paths, other methods, bodies without end, slow ones, broken HTTP."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest

from tests.gateway.conftest import request
from toolkit.gateway import server as server_module
from toolkit.gateway.access import Open
from toolkit.gateway.app import Front
from toolkit.gateway.generation import Parts
from toolkit.gateway.metrics import Metrics
from toolkit.gateway.server import Server, public_socket
from toolkit.gateway.settings import GatewaySettings
from toolkit.gateway.traffic import Traffic
from toolkit.gateway.upstream import Upstream

ENGINE_PATHS = [
    "/tokenize", "/detokenize", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/generate",
    "/v1/responses", "/health", "/version", "/docs", "/redoc", "/server_info", "/v1/files", "/pause", "/sleep",
    "/flush_cache", "/abort_request", "/v1/models/", "/invocations", "/v1/chat/completions/", "//v1/models",
    "/v1/../tokenize",
    "/v1/%2e%2e/tokenize", "/V1/models", "/v1/models;x", "/table", "/drain",
]  # fmt: skip


@pytest.mark.parametrize("path", ENGINE_PATHS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_all_else_is_404_in_openais_form(front, upstream, path, method):
    before = len(upstream.ask("/seen")["seen"])
    status, headers, answer = front.ask(method, path, "{}" if method == "POST" else None)
    assert status == 404
    assert json.loads(answer)["error"] == {
        "message": f"Invalid URL ({method} {path.replace('%2e', '.')})",
        "type": "invalid_request_error",
        "param": None,
        "code": "unknown_url",
    }
    assert headers["x-request-id"]
    assert len(upstream.ask("/seen")["seen"]) == before


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/tickets", "GET"),
        ("POST", "/metrics", "GET"),
        ("OPTIONS", "/readyz", "GET"),
        ("PUT", "/toolkit/certificate", "GET"),
    ],
)
def test_wrong_methods_are_405(front, method, path, allowed):
    status, headers, answer = front.ask(method, path)
    assert (status, headers["allow"]) == (405, allowed)
    assert json.loads(answer)["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/nowhere"])
def test_a_request_for_the_head_alone_is_answered_at_once(front, path):
    with connect(front.port) as connection:
        connection.settimeout(5)
        connection.sendall(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 40")
        assert answer.endswith(b"\r\n\r\n")
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_certificate_is_served_once_there_is_one(front):
    assert json.loads(front.ask("GET", "/toolkit/certificate")[2]) == {
        "proofs": {"token parity": "equal"}
    }


@pytest.mark.parametrize("offered", ["a b", "x" * 129, "é", "<script>", ""])
def test_odd_request_ids_are_replaced(front, upstream, offered):
    headers = {"X-Request-Id": offered.encode("latin-1")}
    made = front.chat("hi")[1]["x-request-id"]
    assert made.startswith("req-")
    status, answered, _ = request(
        "POST", front.port, "/v1/chat/completions",
        {"model": "tickets", "messages": [{"role": "user", "content": "x"}]}, headers,
    )  # fmt: skip
    assert status == 200
    assert answered["x-request-id"].startswith("req-")
    assert upstream.ask("/seen")["seen"][-1]["headers"]["x-request-id"] == answered["x-request-id"]


def test_request_id_goes_to_the_engine_the_log_and_back(front, upstream):
    body = {"model": "tickets", "messages": [{"role": "user", "content": "x"}]}
    headers = front.ask("POST", "/v1/chat/completions", body, **{"X-Request-Id": "a-1.b:c_d"})[1]
    assert headers["x-request-id"] == "a-1.b:c_d"
    assert upstream.ask("/seen")["seen"][-1]["headers"]["x-request-id"] == "a-1.b:c_d"
    logged = front.logged("a-1.b:c_d")
    assert (logged["model"], logged["target"], logged["version"]) == (
        "tickets",
        "stable",
        "1a2b3c4d5e6f7081",
    )
    assert (logged["prompt_tokens"], logged["completion_tokens"], logged["status"]) == (7, 6, 200)


def test_credentials_never_reach_the_engine(front, upstream):
    body = {"model": "tickets", "messages": [{"role": "user", "content": "x"}]}
    front.ask("POST", "/v1/chat/completions", body, Authorization="Bearer secret", Cookie="a=b")
    assert set(upstream.ask("/seen")["seen"][-1]["headers"]) == {
        "host", "content-type", "content-length", "x-request-id",
    }  # fmt: skip


def test_metrics_know_no_names_from_requests(front):
    front.ask(
        "POST",
        "/v1/chat/completions",
        {"model": "evil-name", "messages": [{"role": "user", "content": "x"}]},
    )
    front.ask("GET", "/evil-path")
    text = front.ask("GET", "/metrics")[2].decode()
    assert "evil" not in text
    assert 'toolkit_errors_total{code="model_not_found",model="-",target="-"}' in text
    assert (
        'toolkit_target_info{kind="adapter",model="tickets",run_id="run-1",target="stable"' in text
    )


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def head(length=None, chunked=False):
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
    ]
    lines += [f"Content-Length: {length}"] if length is not None else []
    lines += ["Transfer-Encoding: chunked"] if chunked else []
    return "\r\n".join([*lines, "", ""]).encode()


def read_all(connection):
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def read_until(connection, end):
    data = b""
    while end not in data and (piece := connection.recv(65536)):
        data += piece
    return data


def test_body_of_100_mb_is_refused_before_it_is_read(front):
    with connect(front.port) as connection:
        connection.sendall(head(100_000_000))
        answer = read_until(connection, b"}}")
        assert b" 413 " in answer
        assert b'"code": "request_too_large"' in answer
        assert b"limit of 8 MiB" in answer
        assert b"connection: close" in answer


def test_sender_of_a_large_body_gets_to_read_why(front):
    with connect(front.port) as connection:
        connection.sendall(head(20_000_000))
        connection.sendall(b"x" * 20_000_000)
        assert b"request_too_large" in read_all(connection)


def test_endless_chunks_are_refused(front):
    with connect(front.port) as connection:
        connection.sendall(head(chunked=True))
        sent = 0
        while sent < 200:
            connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            sent += 1
            if sent > 140:
                break
        assert b"request_too_large" in read_until(connection, b"}}")


def test_client_that_waits_for_continue_is_told_before_it_sends(front):
    with connect(front.port) as connection:
        connection.sendall(head(100_000_000).replace(b"Host", b"Expect: 100-continue\r\nHost"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
    body = b'{"model": "tickets", "messages": [{"role": "user", "content": "x"}]}'
    with connect(front.port) as connection:
        connection.sendall(head(len(body)).replace(b"Host", b"Expect: 100-continue\r\nHost"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(body)
        assert b"200 OK" in connection.recv(65536)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + b"A: " + b"x" * 70_000 + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_broken_http_is_400_and_closed(front, nonsense):
    with connect(front.port) as connection:
        connection.sendall(nonsense)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = read_all(connection)
        assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0]
    assert front.ask("GET", "/healthz")[0] == 200


class InThread:
    """A front in a thread, with deadlines short enough for a test."""

    def __init__(self, monkeypatch, upstream):
        monkeypatch.setattr(server_module, "HEADER_TIMEOUT_S", 0.4)
        self.settings = GatewaySettings(name="t", control="/nowhere")
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve()))
        self.thread.start()
        self.ready.wait(30)

    async def serve(self):
        metrics = Metrics()
        parts = Parts(Open(self.settings.front.limits), Upstream(), Traffic(metrics), metrics)
        self.server = Server(Front(self.settings, parts, body_timeout_s=0.4))
        listening = public_socket("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        self.ready.set()
        await self.server.serve_on(listening)
        await parts.upstream.close()

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture
def impatient(monkeypatch, upstream):
    started = InThread(monkeypatch, upstream)
    yield started
    started.stop()


def test_slow_bodies_are_ended(impatient):
    with connect(impatient.port) as connection:
        connection.sendall(head(1000) + b'{"a"')
        answer = read_all(connection)
    assert b" 408 " in answer
    assert b"did not arrive within 0.4 s" in answer
    assert b"connection: close" in answer


def test_slow_headers_are_ended(impatient):
    with connect(impatient.port) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
        begun = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - begun < 15


def test_silent_connections_are_ended(impatient):
    with connect(impatient.port) as connection:
        assert read_all(connection) == b""


def test_slow_headers_on_a_kept_connection_are_ended(impatient):
    with connect(impatient.port) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in read_until(connection, b"}")
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert read_all(connection) == b""
