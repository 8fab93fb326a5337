"""Several fake engines behind the real vllm-router: one dies under load, and no request without a stream fails.

The router's interpreter is the environment ``router``, or ``TOOLKIT_TEST_ROUTER`` where that is set.
"""

import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.test_chaos import Stream, behave, engine_of, ready, restarted
from tests.serving import adapter, ask, gone, kill, spec, supervised, wait_for
from toolkit import environments
from toolkit.engines import guard

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="the guard needs Linux"),
]
CLIENTS = 16


def router_python() -> str:
    given = os.environ.get("TOOLKIT_TEST_ROUTER")
    return given or str(environments.resolve("router").interpreter().python)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    python = router_python()  # of the user's cache, before the tests get one of their own
    folder = tmp_path_factory.mktemp("pair")
    made = spec(folder, adapters=[adapter(folder / "a")], router=python, replicas=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_CACHE", str(folder / "cache"))
        with supervised(made) as started:
            yield started.ready()


@pytest.fixture
def pair(server):
    """The server with all its parts, whatever the test before did to them."""
    wait_for(lambda: {p["state"] for p in server.status()["parts"]} == {"ready"})
    server.events.clear()
    return server


def listening(pids) -> dict[str, set[str]]:
    """Addresses on which the processes listen: {"127.0.0.1": {ports}, ...}."""
    found: dict[str, set[str]] = {}
    sockets = set()
    for pid in pids:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            target = str(Path(entry.path).readlink())
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    for table in ("tcp", "tcp6"):
        with Path(f"/proc/net/{table}").open() as lines:
            for line in list(lines)[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in sockets:
                    address, port = fields[1].split(":")
                    found.setdefault(address, set()).add(port)
    return found


def test_a_replica_killed_under_load_costs_no_request_and_comes_back(pair):
    for index in (0, 1):
        behave(pair, index, delay_s=0.02)
    answers: Counter = Counter()
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            answers[ask(pair.url, "tickets", max_tokens=8)[0]] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(CLIENTS):
            pool.submit(client)
        wait_for(lambda: answers[200] > 100)
        kill(engine_of(pair.part("replica-1")["pid"]))
        wait_for(lambda: restarted(pair, "replica-1"), 10)
        before = answers[200]
        wait_for(lambda: answers[200] > before + 100)
        assert ready(pair.url)  # one is enough
        wait_for(lambda: pair.part("replica-1")["state"] == "ready")
        before = answers[200]
        wait_for(lambda: answers[200] > before + 200)
        stop.set()
    print(dict(answers))
    assert set(answers) == {200}
    assert served(pair, 1) > 20  # by the new process alone


def served(pair, index: int) -> int:
    import json
    import urllib.request

    url = pair.part(f"replica-{index}")["url"]
    with urllib.request.urlopen(f"{url}/_served", timeout=10) as answer:
        return sum(json.load(answer)["served"].values())


def test_broken_streams_end_with_an_error_event_and_others_go_on(pair):
    for index in (0, 1):
        behave(pair, index, delay_s=0.2)
    streams = [Stream(pair.url, "tickets", tokens=30) for _ in range(8)]
    for stream in streams:
        stream.begun()
    kill(engine_of(pair.part("replica-0")["pid"]))
    ends = []
    for stream in streams:
        lines = stream.finished()
        assert stream.broken is None
        ends.append("error" if stream.error else lines[-1])
    assert set(ends) == {"error", "[DONE]"}


def test_a_killed_router_is_started_again_with_both_replicas(pair):
    before = pair.part("router")["pid"]
    kill(min(guard.descendants(before)))
    wait_for(lambda: restarted(pair, "router"), 10)
    wait_for(lambda: pair.part("router")["state"] == "ready")
    wait_for(lambda: ask(pair.url, "tickets")[0] == 200)
    assert gone([before])


def test_a_stopped_replica_is_replaced_and_its_requests_are_answered_by_the_other(pair):
    with ThreadPoolExecutor(CLIENTS) as pool:
        kill(engine_of(pair.part("replica-0")["pid"]), signal.SIGSTOP)
        answers = pool.map(lambda _: ask(pair.url, "tickets", 60)[0], range(CLIENTS))
        assert set(answers) == {200}
    wait_for(lambda: restarted(pair, "replica-0"))


def test_engines_and_router_listen_on_loopback_alone(pair):
    family = guard.descendants(pair.process.pid)
    assert set(listening(family)) == {"0100007F"}
    assert len(listening(family)["0100007F"]) == 5  # front, two engines, the router and its metrics


def test_sigterm_ends_all_of_it(pair):
    family = guard.descendants(pair.process.pid)
    began = time.monotonic()
    pair.signal(signal.SIGTERM)
    assert pair.wait() == 0
    assert gone(family)
    print(f"ended in {time.monotonic() - began:.1f} s")
