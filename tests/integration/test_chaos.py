"""Every part of a server killed, stopped or broken: it heals or everything ends, and nothing is left behind.

The engine is a scripted process (``tests/fake_vllm.py``); supervisor, guard and front are the real ones.
"""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving import (
    PATIENCE_S,
    Supervised,
    adapter,
    ask,
    environ,
    get,
    gone,
    kill,
    spec,
    supervised,
    wait_for,
)
from toolkit.engines import guard
from toolkit.serving.control import request

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="the guard needs Linux"),
]
HEALED_S = 10.0
"""What the issue allows."""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))


def ready(url: str) -> bool:
    return get(f"{url}/readyz")[0] == 200


def metrics(server: Supervised) -> str:
    return str(get(f"{server.url}/metrics")[1].get("text", ""))


def engine_of(guard_pid: int) -> int:
    """The first process of a guard's engine."""
    return min(guard.descendants(guard_pid))


def port_is_free(url: str) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        except OSError:
            return False
        return True


def behave(server: Supervised, index: int = 0, **values) -> None:
    url = server.part(f"replica-{index}")["url"]
    asked = urllib.request.Request(f"{url}/_fake", json.dumps(values).encode())
    urllib.request.urlopen(asked, timeout=10).close()


def restarted(server: Supervised, part: str) -> bool:
    return any(e["event"] == "restart" and e["part"] == part for e in server.events)


class Stream:
    """A streamed answer, read in a thread."""

    def __init__(self, url: str, model: str = "m", tokens: int = 20) -> None:
        self.lines: list[str] = []
        self.broken: str | None = None
        body = {
            "model": model, "stream": True, "max_tokens": tokens,
            "messages": [{"role": "user", "content": "hi"}],
        }  # fmt: skip
        self._asked = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        try:
            with urllib.request.urlopen(self._asked, timeout=60) as answer:
                for raw in answer:
                    if raw.startswith(b"data:"):
                        self.lines.append(raw.decode().removeprefix("data:").strip())
        except OSError as error:
            self.broken = repr(error)

    def begun(self) -> "Stream":
        wait_for(lambda: self.lines or self.broken)
        assert self.broken is None
        return self

    def finished(self) -> list[str]:
        self.thread.join(PATIENCE_S)
        return self.lines

    @property
    def error(self) -> dict | None:
        found = [json.loads(line) for line in self.lines if '"error"' in line]
        return found[-1]["error"] if found else None


def test_the_front_answers_with_the_reason_before_the_engine_is_there(tmp_path):
    with supervised(spec(tmp_path, "serves", "--start-s", "6")) as server:
        wait_for(lambda: "replica-0 starting" in str(get(f"{server.url}/readyz")[1]))
        assert get(f"{server.url}/readyz")[0] == 503
        assert get(f"{server.url}/healthz")[0] == 200
        assert ask(server.url)[0] == 503
        server.ready()
        assert ready(server.url)
        assert ask(server.url)[1]["choices"][0]["message"]["content"] == "m: hi"
        assert get(f"{server.url}/toolkit/certificate")[1]["proofs"] == [["m"]]


@pytest.mark.parametrize("with_adapter", [True, False])
def test_a_request_that_would_end_the_engine_is_refused_by_the_front(tmp_path, with_adapter):
    adapters = [adapter(tmp_path / "a")] if with_adapter else []
    with supervised(spec(tmp_path, adapters=adapters, name="tickets")) as server:
        server.ready()
        name = "tickets-base" if with_adapter else "tickets"
        body = {"model": name, "prompt": "x", "echo": True, "logprobs": 1, "max_tokens": 1}
        asked = urllib.request.Request(
            f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )  # fmt: skip
        if not with_adapter:
            assert urllib.request.urlopen(asked, timeout=30).status == 200
            return
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(asked, timeout=30)
        error = json.loads(refused.value.read())["error"]
        assert (refused.value.code, error["code"], error["param"]) == (400, "not_supported", "echo")
        assert "vLLM on a CPU" in error["message"]


def test_a_killed_front_is_back_on_its_port_and_knows_its_table(tmp_path):
    with supervised(spec(tmp_path)) as server:
        server.ready()
        before, began = server.part("front")["pid"], time.monotonic()
        kill(before)
        wait_for(lambda: restarted(server, "front") and ready(server.url), HEALED_S)
        assert server.part("front")["pid"] != before
        assert ask(server.url)[0] == 200
        assert server.part("replica-0")["restarts"] == 0
        wait_for(lambda: 'toolkit_restarts_total{part="front"} 1.0' in metrics(server))
        assert 'toolkit_restarts_total{part="replica-0"} 0.0' in metrics(server)
        assert 'toolkit_replicas{state="ready"} 1.0' in metrics(server)
        print(f"healed in {time.monotonic() - began:.1f} s")


@pytest.mark.parametrize("victim", ["engine", "guard"])
def test_a_killed_engine_is_started_again_and_proven_before_traffic(tmp_path, victim):
    with supervised(spec(tmp_path, adapters=[adapter(tmp_path / "a")])) as server:
        server.ready()
        guarded = server.part("replica-0")["pid"]
        family = guard.descendants(guarded) | {guarded}
        kill(guarded if victim == "guard" else engine_of(guarded))
        wait_for(lambda: not ready(server.url))
        wait_for(lambda: restarted(server, "replica-0"), HEALED_S)
        wait_for(lambda: 'toolkit_restarts_total{part="replica-0"} 1.0' in metrics(server))
        wait_for(lambda: ready(server.url))
        assert ask(server.url, "tickets")[1]["model"] == "tickets"
        assert server.part("replica-0")["restarts"] == 1
        assert gone(family)
        proofs = [p["detail"] for e in server.events if e["event"] == "parts" for p in e["parts"]]
        assert proofs.count("parity of tickets") >= 2


def test_requests_get_503_with_retry_after_while_the_engine_is_started_again(tmp_path):
    with supervised(spec(tmp_path, "serves", "--start-s", "2")) as server:
        server.ready()
        kill(engine_of(server.part("replica-0")["pid"]))
        wait_for(lambda: restarted(server, "replica-0"))
        asked = urllib.request.Request(
            f"{server.url}/v1/chat/completions",
            b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}',
            {"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as e:
            urllib.request.urlopen(asked, timeout=10)
        assert e.value.code == 503
        assert int(e.value.headers["Retry-After"]) > 0
        e.value.close()


@pytest.mark.parametrize(
    "victims", [["supervisor"], ["supervisor", "guard"], ["supervisor", "guard", "engine"]]
)
def test_a_killed_supervisor_takes_everything_with_it(tmp_path, victims):
    with supervised(spec(tmp_path)) as server:
        url = server.ready().url
        guarded = server.part("replica-0")["pid"]
        pids = {"supervisor": server.process.pid, "guard": guarded, "engine": engine_of(guarded)}
        family = guard.descendants(server.process.pid)
        assert len(family) >= 4
        began = time.monotonic()
        for victim in victims:
            kill(pids[victim])
        wait_for(lambda: gone(family), HEALED_S)
        assert port_is_free(url)
        print(f"gone in {time.monotonic() - began:.1f} s")


def test_a_supervisor_and_its_front_killed_together_leave_nothing(tmp_path):
    with supervised(spec(tmp_path)) as server:
        url = server.ready().url
        family = guard.descendants(server.process.pid)
        front = server.part("front")["pid"]
        kill(server.process.pid)
        kill(front)
        wait_for(lambda: gone(family), HEALED_S)
        assert port_is_free(url)


def test_a_killed_command_takes_a_foreground_server_with_it(tmp_path):
    made = spec(tmp_path)
    code = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from pathlib import Path
from tests.serving import PROGRAM
from toolkit.engines.foreground import serve
from toolkit.serving.state import ServerSpec
spec = ServerSpec.read(Path({made.folder!r}))
serve(spec, detach=False, on_event=lambda e: None, on_ready=lambda r: print(r.pid, r.url, flush=True), program=PROGRAM)
"""
    made.write()
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ()
    )
    pid, url = command.stdout.readline().split()
    family = guard.descendants(int(pid)) | {int(pid)}
    command.kill()
    command.wait()
    command.stdout.close()
    wait_for(lambda: gone(family), HEALED_S)
    assert port_is_free(url)


def test_a_stopped_engine_is_noticed_and_replaced(tmp_path):
    with supervised(spec(tmp_path)) as server:
        server.ready()
        guarded = server.part("replica-0")["pid"]
        began = time.monotonic()
        kill(engine_of(guarded), signal.SIGSTOP)
        wait_for(lambda: restarted(server, "replica-0"))
        cause = server.event("restart")["cause"]
        assert "the engine hangs" in cause
        assert "its process is stopped" in cause
        print(f"noticed in {time.monotonic() - began:.1f} s")
        wait_for(lambda: ready(server.url) and ask(server.url)[0] == 200)
        assert gone([guarded])


def test_an_engine_whose_health_is_fine_but_which_makes_no_token_is_replaced(tmp_path):
    with supervised(spec(tmp_path)) as server:
        server.ready()
        behave(server, hang=True)
        wait_for(lambda: restarted(server, "replica-0"))
        assert "no token in 4 s" in server.event("restart")["cause"]
        wait_for(lambda: ready(server.url))


def test_a_stopped_front_is_replaced(tmp_path):
    with supervised(spec(tmp_path)) as server:
        server.ready()
        kill(server.part("front")["pid"], signal.SIGSTOP)
        wait_for(lambda: restarted(server, "front"))
        wait_for(lambda: ready(server.url))


def test_sigterm_says_not_ready_at_once_and_lets_streams_finish(tmp_path):
    with supervised(spec(tmp_path, drain_s=20)) as server:
        server.ready()
        behave(server, delay_s=0.15)
        stream = Stream(server.url).begun()
        server.signal(signal.SIGTERM)
        server.event("draining")
        status, said = get(f"{server.url}/readyz")
        assert (status, said["error"]["code"]) == (503, "server_stopping")
        assert ask(server.url)[0] == 503
        assert stream.finished()[-1] == "[DONE]"
        assert server.wait() == 0
        assert server.events[-1]["event"] == "stopped"


def test_a_second_signal_ends_it_now_and_the_stream_says_so(tmp_path):
    with supervised(spec(tmp_path, drain_s=60)) as server:
        server.ready()
        behave(server, delay_s=0.5)
        stream = Stream(server.url, tokens=100).begun()
        server.signal(signal.SIGTERM)
        server.event("draining")
        server.signal(signal.SIGTERM)
        assert server.wait(20) == 0
        stream.finished()
        assert stream.error["code"] == "server_stopping", stream.lines[-2:]


def test_a_server_that_ends_without_a_drain_tells_open_streams_before_its_engine_goes(tmp_path):
    with supervised(spec(tmp_path, drain_s=60)) as server:
        server.ready()
        behave(server, delay_s=0.5)
        stream = Stream(server.url, tokens=100).begun()
        request(server.control, "POST", "/stop", {"drain_s": 0})
        assert server.wait(20) == 0
        stream.finished()
        assert stream.error["code"] == "server_stopping", stream.lines[-2:]
        ended = [p for e in server.events if e["event"] == "parts" for p in e["parts"]]
        first = next(p["name"] for p in ended if p["state"] == "stopped")
        assert first == "front"


def test_the_drain_has_a_deadline(tmp_path):
    with supervised(spec(tmp_path, drain_s=2)) as server:
        server.ready()
        behave(server, delay_s=0.5)
        stream = Stream(server.url, tokens=100).begun()
        server.signal(signal.SIGTERM)
        assert server.wait(30) == 0
        stream.finished()
        assert stream.error["code"] == "server_stopping", stream.lines[-2:]


def test_a_failed_start_names_the_cause_and_leaves_nothing(tmp_path):
    with supervised(spec(tmp_path, "fails")) as server:
        error = server.event("error")
        assert "one sequence of 8192 tokens" in error["message"]
        assert "engine-0.log" in error["hint"]
        assert server.wait() == 1
        assert port_is_free(server.url)


def test_a_model_that_is_not_what_was_trained_never_becomes_ready(tmp_path):
    made = spec(tmp_path, adapters=[adapter(tmp_path / "a")])
    (tmp_path / "a" / "unproven").touch()
    with supervised(made) as server:
        error = server.event("error")
        assert (error["kind"], error["message"]) == ("ProofError", "tickets: token 3 differs")
        assert server.wait() == 1
        assert not [e for e in server.events if e["event"] == "ready"]


def test_an_engine_that_dies_again_and_again_ends_the_server_with_its_last_words(tmp_path):
    with supervised(spec(tmp_path, "serves", "--start-s", "0", "--dies-after-s", "4")) as server:
        error = server.event("error", 120)
        assert "ended again after 5 restarts in 10 minutes" in error["message"]
        assert "| last words" in error["message"]
        assert server.wait() == 1
        delays = [e["delay_s"] for e in server.events if e["event"] == "restart"]
        assert delays == [0, 1, 2, 4, 8]


def test_twenty_servers_start_together_on_free_ports(tmp_path):
    servers = [Supervised(spec(tmp_path, name=f"s{n}")) for n in range(20)]
    try:
        urls = {server.ready().url for server in servers}
        assert len(urls) == 20
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda s: ask(s.url, s.spec.name)[1], servers))
        assert [a["model"] for a in answers] == [f"s{n}" for n in range(20)]
    finally:
        for server in servers:
            server.signal(signal.SIGTERM)
        for server in servers:
            server.close()


def test_one_name_is_one_server_however_close_the_starts(tmp_path):
    made = spec(tmp_path)
    with supervised(made) as first, supervised(made) as second:
        wait_for(lambda: first.ended or second.ended)
        loser, winner = (first, second) if first.ended else (second, first)
        assert "runs already" in loser.event("error")["message"]
        assert loser.wait() == 1
        winner.ready()


def test_stop_over_the_control_socket_takes_its_own_drain(tmp_path):
    from toolkit.engines import records

    with supervised(spec(tmp_path, drain_s=60)) as server:
        server.ready()
        behave(server, delay_s=0.5)
        Stream(server.url, tokens=100).begun()
        assert server.status()["in_flight"] == {"m": 1}
        folder = Path(server.spec.folder).parent
        record = records.pick(folder, None)
        assert record.status().ready
        assert Path(record.control).stat().st_mode & 0o077 == 0
        began = time.monotonic()
        records.stop(folder, record, drain_s=1)
        assert time.monotonic() - began < 40
        assert server.wait() == 0
        assert records.living(folder) == []
        assert not Path(record.control).parent.exists()
