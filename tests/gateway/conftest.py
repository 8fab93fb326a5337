"""A front before a fake upstream: real processes, real sockets."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from toolkit.gateway.settings import GatewaySettings
from toolkit.gateway.table import Route, Table, Target

ROOT = Path(__file__).parents[2]
STABLE = Target(
    "tickets@1a2b3c4d5e6f7081",
    "adapter",
    "1a2b3c4d5e6f7081",
    run_id="run-1",
    source="models:/t@prod",
)
CANARY = Target(
    "tickets@2222222222222222",
    "adapter",
    "2222222222222222",
    label="canary",
    weight=0.0,
    run_id="run-2",
)
BASE = Target("demo-base", "base", "bbbbbbbbbbbbbbbb")
SLASH = Target("org/base:tickets", "adapter", "cccccccccccccccc")
ROUTES = (
    Route("tickets", (STABLE, CANARY)),
    Route("demo-base", (BASE,)),
    Route("tickets-s", (SLASH,)),
)


class Upstream:
    """The fake engine; started again on the same port after it died."""

    def __init__(self):
        self.port = 0
        self.process = None
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        with socket.create_server(("127.0.0.1", self.port), backlog=4096) as listening:
            self.port = listening.getsockname()[1]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.gateway.fake_upstream", str(listening.fileno())],
                pass_fds=[listening.fileno()],
                stdout=subprocess.PIPE,
                cwd=ROOT,
            )
        self.process.stdout.readline()

    def ask(self, path):
        return json.loads(request("GET", self.port, path)[2])

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@dataclass
class FrontProcess:
    folder: Path
    process: subprocess.Popen
    port: int
    table: Table
    headers: dict = field(default_factory=dict)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method, path, body=None, **headers):
        return request(method, self.port, path, body, {**self.headers, **headers})

    def chat(self, text="hi", **more):
        body = {"model": "tickets", "messages": [{"role": "user", "content": text}], **more}
        status, headers, answer = self.ask("POST", "/v1/chat/completions", body)
        return status, headers, json.loads(answer)

    def control(self, method, path, body=None):
        connection = UnixConnection(str(self.folder / "c"))
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        return response.status, answer

    def put(self, table):
        self.table = table
        assert self.control("PUT", "/table", json.loads(table.to_json()))[0] == 200

    def log(self):
        self.wait_for((self.folder / "access.jsonl").exists)
        time.sleep(0.05)
        return [
            json.loads(line) for line in (self.folder / "access.jsonl").read_text().splitlines()
        ]

    def logged(self, request_id):
        return self.wait_for(
            lambda: next((line for line in self.log() if line["request_id"] == request_id), None)
        )

    def wait_for(self, true, seconds=10):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := true():
                return found
            time.sleep(0.02)
        raise AssertionError("it did not happen")

    def status(self):
        return self.control("GET", "/status")[1]

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("front")
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


def request(method, port, path, body=None, headers=()):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    if isinstance(body, dict | list):
        body = json.dumps(body)
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, {k.lower(): v for k, v in response.getheaders()}, answer


def start_front(folder, upstream, *, environ=None, ready=True, **settings):
    """A front on a free port, with the table that most tests use."""
    file = folder / "settings.json"
    given = GatewaySettings(
        name="demo",
        port=0,
        control=folder / "c",
        access_log=folder / "access.jsonl",
        state_file=folder / "state.json",
        **settings,
    )
    file.write_text(given.model_dump_json())
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit.gateway", str(file)],
        stdin=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(folder), **(environ or {})},
    )
    front = FrontProcess(folder, process, 0, Table(None, (), 0, ready=False))
    front.wait_for(lambda: (folder / "state.json").exists() or process.poll() is not None, 60)
    front.port = json.loads((folder / "state.json").read_text())["port"]
    front.put(
        Table(
            upstream.url,
            ROUTES,
            1024,
            ready=ready,
            certificate={"proofs": {"token parity": "equal"}},
        )
    )
    return front


@pytest.fixture(scope="session")
def upstream():
    started = Upstream()
    yield started
    started.stop()


@pytest.fixture
def mortal():
    """An upstream of one test's own, to be killed."""
    started = Upstream()
    yield started
    started.stop()


@pytest.fixture(scope="session")
def front(upstream):
    with tempfile.TemporaryDirectory(prefix="front-") as folder:
        started = start_front(Path(folder), upstream)
        yield started
        started.stop()


@pytest.fixture
def fronts(tmp_path_factory):
    """Starts fronts with settings of a test's own."""
    started = []

    def start(upstream, **settings):
        folder = Path(
            tempfile.mkdtemp(prefix="front-")
        )  # short: a Unix socket's path has 108 bytes at most
        front = start_front(folder, upstream, **settings)
        started.append(front)
        return front

    yield start
    for front in started:
        front.stop()
