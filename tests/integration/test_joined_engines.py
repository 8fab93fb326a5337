"""A server with an engine of its own and one that somebody else runs: proven, balanced, lost, back, and left alone."""

import contextlib
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fleet import PROGRAM as ENGINE
from tests.integration.test_replicas_behind_the_router import router_python
from tests.serving import adapter, ask, get, spec, supervised, wait_for
from toolkit.engines.client import Client
from toolkit.engines.ports import held

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="the guard needs Linux"),
]


@contextlib.contextmanager
def elsewhere(port: int):
    """An engine that no supervisor started; its process."""
    argv = [sys.executable, str(ENGINE), str(port), "m-base", "--start-s", "0"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        wait_for(Client(f"http://127.0.0.1:{port}").healthy)
        yield process
    finally:
        process.kill()
        process.wait()


def served(url: str) -> Counter:
    return Counter(get(f"{url}/_served")[1]["served"])


def test_an_engine_of_elsewhere_is_proven_balanced_lost_and_taken_back(tmp_path, monkeypatch):
    python = router_python()
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    answers, stop = Counter(), threading.Event()
    tickets = adapter(tmp_path / "a")

    def client(url: str) -> None:
        while not stop.is_set():
            answers[ask(url, "tickets", max_tokens=4)[0]] += 1

    with held(0) as port:
        theirs = f"http://127.0.0.1:{port}"
    made = spec(tmp_path, adapters=[tickets], router=python, engines=[theirs])
    with elsewhere(port) as engine, supervised(made) as server, ThreadPoolExecutor(8) as pool:
        server.ready()
        parts = [(p["name"], p["state"]) for p in server.status()["parts"]]
        assert parts == [(n, "ready") for n in ("front", "replica-0", "joined-0", "router")]
        assert tickets.lora_name in Client(theirs).models()  # brought, and proven there
        try:
            for _ in range(8):
                pool.submit(client, server.url)
            wait_for(lambda: served(theirs)[tickets.lora_name] > 20)
            engine.kill()
            wait_for(lambda: server.part("joined-0")["state"] == "waiting")
            before = answers[200]
            wait_for(lambda: answers[200] > before + 50)
            assert get(f"{server.url}/readyz")[0] == 200
            with elsewhere(port) as again:
                wait_for(lambda: server.part("joined-0")["state"] == "ready")
                wait_for(lambda: served(theirs)[tickets.lora_name] > 20)
                stop.set()
                pool.shutdown()
                assert set(answers) == {200}
                server.process.stdin.close()  # the server ends, and leaves it alone
                server.wait()
                assert again.poll() is None
                assert Client(theirs).healthy()
        finally:
            stop.set()
    assert [e for e in server.events if e["event"] == "restart"] == []
