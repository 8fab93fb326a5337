"""The load generator against an endpoint whose times are known."""

import http.server
import json
import threading
import time
from contextlib import contextmanager
from itertools import accumulate

import pytest
from click.testing import CliRunner

from toolkit.bench import prompts, report
from toolkit.bench.load import Sample, measure
from toolkit.cli import toolkit
from toolkit.engines.client import Client
from toolkit.errors import DataError, EngineError, UsageError

FIRST_S, GAP_S, TOKENS = 0.20, 0.05, 5


class Stream(http.server.BaseHTTPRequestHandler):
    """TOKENS tokens in TOKENS - 1 events (the last holds two), then usage; the first after FIRST_S."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.plain(200, {"data": [{"id": "m-base"}, {"id": "m"}]})

    def plain(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def event(self, value):
        data = (
            b"data: "
            + (value if isinstance(value, bytes) else json.dumps(value).encode())
            + b"\n\n"
        )
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.together.wait(60)
        text = asked["messages"][-1]["content"]
        if text == "refuse":
            return self.plain(400, {"error": {"message": "no such thing"}})
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        time.sleep(FIRST_S)
        for index in range(TOKENS - 1):
            if index:
                time.sleep(GAP_S)
            self.event({"choices": [{"delta": {"content": "x"}}]})
        if text != "break":
            self.event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": TOKENS}})
            self.event(b"[DONE]")
        self.wfile.write(b"0\r\n\r\n")
        return None


@contextmanager
def endpoint(together: int = 1):
    """It answers when as many requests are there as stand together."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stream)
    server.asked = []
    server.together = threading.Barrier(together)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(text: str):
    return [{"role": "user", "content": text}]


def test_times_are_those_of_the_endpoint():
    with endpoint() as (_, url):
        level = measure(Client(url), "m", [ask("a")] * 3, concurrency=1, options={})
    for sample in level.samples:
        assert sample.error is None
        assert sample.ttft >= FIRST_S
        assert len(sample.gaps) == TOKENS - 2
        # one gap alone is shorter where the token before it was read late
        assert FIRST_S + (TOKENS - 2) * GAP_S <= sample.ttft + sum(sample.gaps) <= sample.e2e
        assert sample.completion_tokens == TOKENS, "from usage, not from the number of events"
        assert sample.tpot == pytest.approx((sample.e2e - sample.ttft) / (TOKENS - 1))
    assert level.seconds >= sum(sample.e2e for sample in level.samples)
    # the best of them, because a busy machine reads late
    assert min(s.ttft for s in level.samples) == pytest.approx(FIRST_S, abs=0.1)
    nearest = min((gap for s in level.samples for gap in s.gaps), key=lambda gap: abs(gap - GAP_S))
    assert nearest == pytest.approx(GAP_S, abs=0.05)


def test_as_many_requests_are_in_flight_as_there_are_clients():
    with endpoint(together=8) as (_, url):
        level = measure(Client(url), "m", [ask("a")] * 16, concurrency=8, options={})
    assert [sample.error for sample in level.samples] == [None] * 16
    at = sorted((moment, change) for s in level.samples
                for moment, change in ((s.start, 1), (s.start + s.e2e, -1)))  # fmt: skip
    assert max(accumulate(change for _, change in at)) == 8


def test_failures_are_counted_and_are_in_no_number():
    with endpoint() as (_, url):
        asked = [ask("a"), ask("refuse"), ask("break")]
        summary = report.summarize(measure(Client(url), "m", asked, concurrency=3, options={}))
    assert (summary["requests"], summary["errors"]) == (3, 2)
    assert summary["completion_tokens"] == TOKENS
    assert any("no such thing" in text for text in summary["error_messages"])
    assert any("without [DONE]" in text for text in summary["error_messages"])
    assert summary["ttft_ms"]["p50"] > FIRST_S * 1000


def test_a_dead_endpoint_is_an_error_of_every_request():
    with endpoint() as (_, url):
        pass
    summary = report.summarize(measure(Client(url), "m", [ask("a")] * 2, concurrency=2, options={}))
    assert summary["errors"] == 2
    assert summary["ttft_ms"] is None


def test_percentiles_interpolate_like_numpy():
    values = [4.0, 1.0, 3.0, 2.0]
    assert report.percentile(values, 50) == 2.5
    assert report.percentile(values, 99) == pytest.approx(3.97)
    assert report.percentile([5.0], 99) == 5.0
    with pytest.raises(ValueError, match="no values"):
        report.percentile([], 50)


def test_a_single_token_has_no_time_per_token():
    assert Sample(0, 0.1, 0.2, (), 3, 1).tpot is None


def run(*args: str):
    return CliRunner().invoke(toolkit, ["bench", *args], standalone_mode=False)


def test_the_command_writes_what_it_measured(tmp_path):
    with endpoint() as (server, url):
        result = run(
            "--url", url, "--concurrency", "1,2", "--requests", "2", "--max-tokens", "9",
            "--output", str(tmp_path), "--json",
        )  # fmt: skip
        assert result.exception is None, result.exception
        assert {request["max_tokens"] for request in server.asked} == {9}
        assert {request["model"] for request in server.asked} == {"m-base"}
        assert all(request["ignore_eos"] and request["stream"] for request in server.asked)
        assert len({request["messages"][0]["content"] for request in server.asked}) == 4, (
            "no two prompts are alike"
        )
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert [level["concurrency"] for level in saved["levels"]] == [1, 2]
    assert saved["levels"][1]["completion_tokens"] == 2 * TOKENS
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4


def test_the_command_fails_when_a_request_failed(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": ask("refuse")}) + "\n")
    with endpoint() as (_, url):
        result = run(
            "--url",
            url,
            "--concurrency",
            "1",
            "--requests",
            "2",
            "--rows",
            str(rows),
            "--stop-early",
        )
    assert isinstance(result.exception, EngineError)
    assert "2 requests failed" in result.exception.message


def test_an_unknown_model_is_named_with_its_likely_name():
    with endpoint() as (_, url):
        result = run("--url", url, "--model", "m-bas")
    assert isinstance(result.exception, UsageError)
    assert "serves no model 'm-bas' (did you mean 'm-base'?)" in result.exception.message


@pytest.mark.parametrize("levels", ["x", "1,0", ""])
def test_concurrency_is_a_list_of_numbers(levels):
    result = CliRunner().invoke(
        toolkit, ["bench", "--url", "http://127.0.0.1:1", "--concurrency", levels]
    )
    assert result.exit_code == 2


def test_rows_ask_everything_before_the_last_answer(tmp_path):
    file = tmp_path / "rows.jsonl"
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    assert prompts.from_rows(file, 3) == [turns[:2]] * 3
    file.write_text('{"text": "t"}\n')
    with pytest.raises(DataError, match="no row with messages"):
        prompts.from_rows(file, 1)
    file.write_text("no json\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1 is not a JSON object"):
        prompts.from_rows(file, 1)


def test_a_url_without_scheme_is_refused():
    with pytest.raises(UsageError, match="is not the URL of an endpoint"):
        Client("127.0.0.1:8000")
