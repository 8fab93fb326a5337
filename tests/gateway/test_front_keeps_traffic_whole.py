"""What happens to requests when engines die, clients leave, tables change and the server stops."""

import contextlib
import http.client
import json
import signal
import socket
import threading
import time
from dataclasses import replace

import pytest

from tests import redis_server
from tests.gateway.conftest import CANARY, ROUTES, STABLE, request
from toolkit.gateway.table import Route

pytestmark = pytest.mark.integration  # waits for deadlines, half a minute in all
server = redis_server.server


class Stream(threading.Thread):
    """A streaming client in a thread of its own."""

    def __init__(self, front, script, model="tickets", **headers):
        super().__init__(daemon=True)
        self.connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
        body = {
            "model": model,
            "stream": True,
            "messages": [{"role": "user", "content": json.dumps(script)}],
        }
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        self.lines = []
        self.first = threading.Event()
        self.status = None
        self.headers = {}
        self.start()

    def run(self):
        response = self.connection.getresponse()
        self.status = response.status
        self.headers = {k.lower(): v for k, v in response.getheaders()}
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, AttributeError):
            while line := response.readline():
                if line.strip():
                    self.lines.append(line.decode().strip())
                    self.first.set()
        self.first.set()
        self.connection.close()

    def answer(self):
        self.join(30)
        assert not self.is_alive()
        return self.lines

    @property
    def words(self):
        events = [json.loads(line[6:]) for line in self.lines if line.startswith("data: {")]
        return [e["choices"][0]["delta"].get("content") for e in events if e.get("choices")]


def error_of(line):
    return json.loads(line.removeprefix("data: "))["error"]


LONG = {"tokens": 200, "delay_s": 0.02}


def test_engine_that_is_not_there_is_503(fronts, mortal):
    front = fronts(mortal)
    mortal.stop()
    status, headers, answer = front.chat()
    assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
    assert headers["retry-after"] == "1"
    assert front.status()["in_flight"] == {}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("die", ["before", "headers"])
def test_engine_that_dies_before_the_first_byte_is_502(fronts, mortal, die, stream):
    if die == "headers" and not stream:
        pytest.skip("only streams have headers first")
    front = fronts(mortal)
    status, _, answer = front.chat(json.dumps({"die": die}), stream=stream)
    assert (status, answer["error"]["code"]) in ((502, "engine_died"), (502, "stream_broken"))
    assert answer["error"]["type"] == "server_error"


def test_engine_that_answers_with_no_http_is_502(fronts, upstream):
    front = fronts(upstream)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nno header\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        front.put(replace(front.table, upstream=f"http://127.0.0.1:{listening.getsockname()[1]}"))
        status, headers, said = front.chat()
        thread.join(10)
    assert (status, said["error"]["code"]) == (502, "engine_died")
    assert front.logged(headers["x-request-id"])["cause"]


def test_engine_that_dies_in_a_stream_gives_an_error_event(fronts, mortal):
    front = fronts(mortal)
    lines = Stream(front, {"die": "middle", "tokens": 50}).answer()
    assert lines[-1].startswith('data: {"error"')
    assert error_of(lines[-1])["code"] == "stream_broken"
    assert "data: [DONE]" not in lines


@pytest.mark.parametrize("end", ["silent", "half"])
def test_stream_that_ends_without_done_gives_an_error_event(front, end):
    lines = Stream(front, {"end": end, "tokens": 50}).answer()
    assert error_of(lines[-1])["message"] == "The engine broke off in the middle of its answer."
    assert not any("cho" in line[-5:] for line in lines)


def test_engine_may_have_closed_an_idle_connection(fronts, mortal):
    front = fronts(mortal)
    assert front.chat()[0] == 200
    mortal.stop()
    mortal.start()
    assert front.chat()[0] == 200


def test_client_that_leaves_a_stream_aborts_it_at_the_engine(front, upstream):
    stream = Stream(front, LONG, **{"X-Request-Id": "leaves"})
    stream.first.wait(10)
    stream.connection.sock.shutdown(socket.SHUT_RDWR)
    front.wait_for(lambda: "leaves" in upstream.ask("/seen")["aborted"])
    logged = front.logged("leaves")
    assert (logged["status"], logged["error"]) == (499, "client_gone")
    assert logged["tokens_estimated"]
    assert logged["completion_tokens"] > 0
    front.wait_for(lambda: not front.status()["in_flight"])


def test_client_that_leaves_after_the_last_event_has_its_answer(front):
    """The `openai` client closes at `[DONE]`, often before the response ends."""
    stream = Stream(front, {"tokens": 2, "linger_s": 1}, **{"X-Request-Id": "has-it"})
    assert stream.answer()[-1] == "data: [DONE]"  # the front does not wait for the engine's end
    logged = front.logged("has-it")
    assert (logged["status"], logged["error"], logged["completion_tokens"]) == (200, None, 2)
    front.wait_for(lambda: not front.status()["in_flight"])


def test_client_that_leaves_before_an_answer_aborts_it_at_the_engine(front, upstream):
    connection = http.client.HTTPConnection("127.0.0.1", front.port)
    body = {"model": "tickets", "messages": [{"role": "user", "content": '{"sleep_s": 30}'}]}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"X-Request-Id": "whole"})
    front.wait_for(lambda: upstream.ask("/seen")["open"])
    connection.close()
    front.wait_for(lambda: "whole" in upstream.ask("/seen")["aborted"])
    assert front.logged("whole")["status"] == 499


def test_swap_counts_streams_of_the_old_adapter_until_they_end(fronts, upstream):
    front = fronts(upstream)
    old = Stream(front, {"tokens": 20, "delay_s": 0.05})
    old.first.wait(10)
    assert front.status()["in_flight"] == {STABLE.model_id: 1}
    new = replace(STABLE, model_id="tickets@3333333333333333", version="3333333333333333")
    front.put(replace(front.table, routes=(Route("tickets", (new,)), *ROUTES[1:])))
    status, headers, _ = front.chat()
    assert (status, headers["x-toolkit-model-version"]) == (200, "3333333333333333")
    assert front.status()["in_flight"] == {STABLE.model_id: 1}
    old.answer()
    assert len([word for word in old.words if word]) == 20
    assert old.headers["x-toolkit-model-version"] == STABLE.version
    front.wait_for(lambda: front.status()["in_flight"] == {})


def counted(front):
    """Requests answered by the stable version and by the canary, as the metrics have them."""
    text = front.ask("GET", "/metrics")[2].decode()
    name = 'toolkit_requests_total{key="none",model="tickets",status="200",target="%s"} '
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return [float(lines.get((name % t).strip(), 0)) for t in ("stable", "canary")]


def test_canary_answers_by_header_and_by_weight(fronts, upstream):
    front = fronts(upstream)

    def label(**headers):
        body = {"model": "tickets", "messages": [{"role": "user", "content": "hi"}]}
        return front.ask("POST", "/v1/chat/completions", body, **headers)[1]["x-toolkit-target"]

    assert {label() for _ in range(20)} == {"stable"}
    assert label(**{"X-Toolkit-Target": "canary"}) == "canary"
    pair = (replace(STABLE, weight=0.75), replace(CANARY, weight=0.25))
    front.put(replace(front.table, routes=(Route("tickets", pair),)))
    before = counted(front)
    share = [label() for _ in range(300)].count("canary")
    assert 38 <= share <= 112  # 75, and five standard deviations
    assert [now - was for now, was in zip(counted(front), before, strict=True)] == [
        300 - share,
        share,
    ]
    status, _, answer = front.ask(
        "POST", "/v1/chat/completions",
        {"model": "tickets", "messages": [{"role": "user", "content": "x"}]}, **{"X-Toolkit-Target": "beta"},
    )  # fmt: skip
    assert status == 400
    assert "it has: stable, canary" in json.loads(answer)["error"]["message"]
    text = front.ask("GET", "/metrics")[2].decode()
    for target in ("stable", "canary"):  # side by side
        for metric in (
            "request_seconds_count",
            "engine_wait_seconds_count",
            "in_flight",
            "target_weight",
        ):
            assert f'toolkit_{metric}{{model="tickets",target="{target}"}}' in text
        assert (
            f'toolkit_tokens_total{{key="none",kind="completion",model="tickets",target="{target}"}}'
            in text
        )


def test_metrics_say_what_the_supervisor_counts(front):
    front.put(
        replace(
            front.table, replicas={"ready": 1, "waiting": 1}, restarts={"front": 0, "replica-1": 3}
        )
    )
    text = front.ask("GET", "/metrics")[2].decode()
    for line in (
        'toolkit_replicas{state="ready"} 1.0', 'toolkit_replicas{state="waiting"} 1.0',
        'toolkit_replicas{state="starting"} 0.0', 'toolkit_restarts_total{part="front"} 0.0',
        'toolkit_restarts_total{part="replica-1"} 3.0',
    ):  # fmt: skip
        assert line in text
    front.put(replace(front.table, replicas={"ready": 2}, restarts={"front": 0, "replica-1": 3}))
    text = front.ask("GET", "/metrics")[2].decode()
    assert 'toolkit_replicas{state="ready"} 2.0' in text
    assert 'toolkit_replicas{state="waiting"} 0.0' in text


def test_not_ready_refuses_with_the_reason(fronts, upstream):
    front = fronts(upstream, ready=False)
    front.put(replace(front.table, reason="proof failed: tickets changes nothing"))
    status, headers, answer = front.ask("GET", "/readyz")
    assert status == 503
    assert "proof failed: tickets changes nothing" in json.loads(answer)["error"]["message"]
    status, headers, answer = front.chat()
    assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "not_ready", "2")
    assert front.ask("GET", "/healthz")[0] == 200
    front.put(replace(front.table, ready=True, reason=None))
    assert front.ask("GET", "/readyz")[0] == 200


@pytest.mark.parametrize("how", ["control", "signal"])
def test_drain_refuses_what_is_new_and_finishes_what_is_open(fronts, upstream, how):
    front = fronts(upstream)
    stream = Stream(front, {"tokens": 25, "delay_s": 0.05})
    stream.first.wait(10)
    if how == "control":
        assert front.control("POST", "/drain", {"deadline_s": 30})[1]["draining"]
    else:
        front.process.send_signal(signal.SIGTERM)
    front.wait_for(lambda: front.ask("GET", "/readyz")[0] == 503, 2)
    status, headers, answer = front.chat()
    assert (status, answer["error"]["code"]) == (503, "server_stopping")
    assert (headers["retry-after"], headers["connection"]) == ("1", "close")
    assert stream.answer()[-1] == "data: [DONE]"
    assert len([word for word in stream.words if word]) == 25
    assert front.process.wait(10) == 0
    assert len(front.log()) == 2


def test_drain_deadline_ends_streams_with_an_error_event(fronts, upstream):
    front = fronts(upstream)
    stream = Stream(front, LONG)
    stream.first.wait(10)
    waiting = threading.Thread(target=lambda: whole.append(front.chat('{"sleep_s": 30}')))
    whole = []
    waiting.start()
    front.wait_for(lambda: front.status()["in_flight"] == {STABLE.model_id: 2})
    front.control("POST", "/drain", {"deadline_s": 0.3})
    assert error_of(stream.answer()[-1])["code"] == "server_stopping"
    waiting.join(10)
    assert (whole[0][0], whole[0][2]["error"]["code"]) == (503, "server_stopping")
    assert front.process.wait(10) == 0


def test_second_signal_ends_now(fronts, upstream):
    front = fronts(upstream)
    stream = Stream(front, LONG)
    stream.first.wait(10)
    front.process.send_signal(signal.SIGTERM)
    front.wait_for(lambda: front.ask("GET", "/readyz")[0] == 503, 2)
    front.process.send_signal(signal.SIGTERM)
    assert error_of(stream.answer()[-1])["code"] == "server_stopping"
    assert front.process.wait(10) == 0


def test_front_without_supervisor_ends(fronts, upstream):
    front = fronts(upstream)
    stream = Stream(front, LONG)
    stream.first.wait(10)
    begun = time.monotonic()
    front.process.stdin.close()
    assert front.process.wait(10) == 1
    assert time.monotonic() - begun < 10
    assert error_of(stream.answer()[-1])["code"] == "server_stopping"
    with pytest.raises(ConnectionRefusedError):
        request("GET", front.port, "/healthz")


def test_full_server_refuses(fronts, upstream):
    front = fronts(upstream, front={"limits": {"max_in_flight": 1}})
    stream = Stream(front, {"tokens": 30, "delay_s": 0.02})
    stream.first.wait(10)
    status, headers, answer = front.chat()
    assert (status, answer["error"]["code"]) == (503, "overloaded")
    assert "retry-after" in headers
    stream.answer()
    assert front.chat()[0] == 200


def test_log_that_cannot_be_written_does_not_stop_traffic(fronts, upstream):
    front = fronts(upstream)
    front.chat()
    front.log()
    (front.folder / "access.jsonl").unlink()
    (front.folder / "access.jsonl").mkdir()
    for _ in range(3):
        assert front.chat()[0] == 200
    dropped = 'toolkit_log_dropped_total{sink="access_log"}'
    front.wait_for(lambda: f"{dropped} 3.0" in front.ask("GET", "/metrics")[2].decode())
    (front.folder / "access.jsonl").rmdir()
    front.chat()
    assert len(front.log()) == 1  # a rotated log is begun anew


def test_prompts_are_logged_only_when_asked_for(front, fronts, upstream):
    front.ask(
        "POST",
        "/v1/chat/completions",
        {"model": "tickets", "messages": [{"role": "user", "content": "my secret"}]},
    )
    time.sleep(0.2)
    assert "my secret" not in (front.folder / "access.jsonl").read_text()
    open_front = fronts(upstream, front={"log_prompts": True})
    open_front.chat("my secret")
    Stream(open_front, {"tokens": 2}).answer()
    first, second = open_front.wait_for(lambda: log if len(log := open_front.log()) == 2 else None)
    assert first["request"]["messages"][0]["content"] == "my secret"
    assert "w0 w1" in first["answer"]
    assert '"content":"w1 "' in second["answer"]


def test_refusals_of_the_engine_are_logged_without_what_they_quote(front):
    for status, found in (
        (400, "engine: 400"),
        (500, 'engine: 500 {"error": {"message": "my secret"'),
    ):
        text = json.dumps({"status": status, "text": "my secret"})
        request_id = front.chat(text)[1]["x-request-id"]
        assert front.logged(request_id)["cause"][: len(found)] == found
        assert (front.logged(request_id)["cause"] == found) is (status == 400)


def test_deterministic_answers_come_from_the_cache(fronts, upstream):
    front = fronts(upstream, front={"cache": {"kind": "memory"}})
    first = front.chat("cache me", temperature=0)
    asked = len(upstream.ask("/seen")["seen"])
    again = front.chat("cache me", temperature=0)
    assert (first[1]["x-toolkit-cache"], again[1]["x-toolkit-cache"]) == ("miss", "hit")
    assert first[2] == again[2]
    assert len(upstream.ask("/seen")["seen"]) == asked
    new = replace(front.table, certificate={"proofs": "new"})
    front.put(new)
    assert front.chat("cache me", temperature=0)[1]["x-toolkit-cache"] == "miss"


def test_servers_of_one_model_share_answers_in_redis_and_others_do_not(fronts, upstream, server):
    """Each has proven its model itself, at another time and under another id."""
    kept = {"cache": {"kind": "redis", "url_env": "REDIS_URL"}}
    both = [fronts(upstream, front=kept, environ={"REDIS_URL": server.url}) for _ in range(2)]
    for number, front in enumerate(both):
        told = {
            "answers": "same",
            "id": str(number),
            "time": f"12:0{number}",
            "phases": {"total": number},
        }
        front.put(replace(front.table, certificate=told))
    first, again = (front.chat("share me", temperature=0) for front in both)
    assert (first[1]["x-toolkit-cache"], again[1]["x-toolkit-cache"]) == ("miss", "hit")
    assert first[2] == again[2]
    both[1].put(replace(both[1].table, certificate={"answers": "of another template"}))
    assert both[1].chat("share me", temperature=0)[1]["x-toolkit-cache"] == "miss"


def test_sockets_and_files_are_private(front):
    assert (front.folder / "c").stat().st_mode & 0o777 == 0o600
    front.chat()
    front.log()
    assert (front.folder / "access.jsonl").stat().st_mode & 0o777 == 0o600


def test_control_refuses_what_it_does_not_know(front):
    assert front.control("PUT", "/table", {"upstream": 1})[0] == 400
    assert front.control("POST", "/drain", {})[0] == 400
    assert front.control("GET", "/table")[0] == 404
    assert front.ask("GET", "/status")[0] == 404
    assert front.ask("PUT", "/table", {})[0] == 404
