"""Held-out rows, intervals, partial results, reports, and the OpenAI client against a real local server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from toolkit.errors import ArtifactError, EngineError, NotInstalledError
from toolkit.evaluation import lm_eval
from toolkit.evaluation.endpoint import Endpoint
from toolkit.evaluation.interval import Estimate, mean_interval, perplexity_interval
from toolkit.evaluation.partial import PartialResults
from toolkit.evaluation.report import Report, worst
from toolkit.evaluation.rows import HeldoutRow, choose, read_rows
from toolkit.recipe.evaluate import LmEvalSection


def conversation(row: str, *turns: tuple[str, str]) -> str:
    return json.dumps({"id": row, "messages": [{"role": r, "content": c} for r, c in turns]}) + "\n"


def test_the_last_answer_is_the_reference_and_the_rest_the_prompt(tmp_path: Path):
    file = tmp_path / "heldout.jsonl"
    file.write_text(
        conversation("b", ("user", "1?"), ("assistant", "2"), ("user", "3?"), ("assistant", "4"))
        + conversation("a", ("user", "no answer"))
        + json.dumps({"id": "c", "text": "plain"})
    )
    first, second, third = read_rows(file)
    assert (first.reference, len(first.prompt), first.index) == ("4", 3, 0)
    assert (second.reference, second.prompt) == (None, ())
    assert third.reference is None


def test_an_answer_that_is_a_tool_call_is_no_empty_reference(tmp_path: Path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = {"id": "a", "messages": [{"role": "user", "content": "1?"}, answer]}
    (tmp_path / "heldout.jsonl").write_text(json.dumps(row))
    (found,) = read_rows(tmp_path / "heldout.jsonl")
    assert found.reference == '[{"name": "f", "arguments": {"a": 1}}]'


def test_a_dataset_without_held_out_rows_is_named(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"the dataset has no heldout\.jsonl"):
        read_rows(tmp_path / "heldout.jsonl")


def test_the_same_rows_are_chosen_whatever_their_order():
    rows = [HeldoutRow(n, f"{n * 7 % 10}", {}, (), "x") for n in range(10)]
    assert [row.id for row in choose(rows, 3)] == ["0", "1", "2"]
    assert choose(rows[::-1], 3) == choose(rows, 3)


def test_interval_of_equal_scores_is_a_point():
    assert mean_interval([1.0] * 20) == Estimate(1.0, 1.0, 1.0)


def test_interval_holds_the_mean_and_narrows_with_rows():
    few, many = mean_interval([0, 1] * 10), mean_interval([0, 1] * 200)
    assert few.low < 0.5 < few.high
    assert few.value == many.value == 0.5
    # A binomial's 95 % interval at 400 rows is 0.5 +- 0.049.
    assert 0.08 < many.high - many.low < 0.12 < few.high - few.low


def test_perplexity_is_over_tokens_not_over_rows():
    import math

    found = perplexity_interval([(math.log(2) * 10, 10), (math.log(8) * 2, 2)])
    assert found.value == pytest.approx(2 ** (16 / 12))
    assert found.low == pytest.approx(2)
    assert found.high == pytest.approx(8)


def test_partial_results_survive_and_a_torn_line_is_dropped(tmp_path: Path):
    file = tmp_path / "answers.jsonl"
    PartialResults(file, resume=True).add("a", {"prediction": "ä"})
    with file.open("a") as torn:
        torn.write('{"id": "b", "predic')
    again = PartialResults(file, resume=True)
    assert "a" in again
    assert "b" not in again
    again.add("b", {"prediction": "2"})
    assert PartialResults(file, resume=True)["b"] == {"prediction": "2"}
    assert len(PartialResults(file, resume=False)) == 0


def test_report_has_means_intervals_and_the_worst_rows(tmp_path: Path):
    results = [
        {"id": "1", "prediction": "a", "reference": "a", "scores": {"exact_match": 1.0}},
        {"id": "2", "prediction": "b", "reference": "c", "scores": {"exact_match": 0.0}},
    ]
    report = Report(
        "tuned", "engine", 2, 1, {"exact_match": Estimate(0.5, 0.0, 1.0)}, worst(results)
    )
    report.write(tmp_path)
    assert report.metrics() == {"exact_match": 0.5, "rows": 2.0}
    assert json.loads((tmp_path / "report.json").read_text())["metrics"]["exact_match"] == {
        "value": 0.5,
        "ci95": [0.0, 1.0],
    }
    text = (tmp_path / "report.md").read_text()
    assert "2 held-out rows, through engine." in text
    assert "1 rows have no answer" in text
    assert "| exact_match | 0.5000 | 0.0000 to 1.0000 |" in text
    assert "### 2" in text
    assert "### 1" not in text


class Engine(BaseHTTPRequestHandler):
    """Answers in upper case; refuses what holds the word "refuse"."""

    seen: list[dict] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, **body})
        question = body["messages"][-1]["content"]
        status, reply = 200, {"choices": [{"message": {"content": question.upper()}}]}
        if question == "refuse":
            status, reply = 400, {"error": "too long"}
        elif question == "odd":
            reply = {"choices": []}
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def url():
    Engine.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def row(text: str, **data) -> HeldoutRow:
    return HeldoutRow(0, text, data, ({"role": "user", "content": text},), "x")


def test_answers_come_back_with_their_row(url: str):
    rows = [row(f"question {n}") for n in range(20)]
    answers = dict(Endpoint(url + "/v1/", "m").generate(rows, limits=[9] * 20, concurrent=4))
    assert answers == {n: f"QUESTION {n}" for n in range(20)}
    assert {each["path"] for each in Engine.seen} == {"/v1/chat/completions"}


def test_requests_are_greedy_and_carry_limit_and_tools(url: str):
    tools = [{"type": "function", "function": {"name": "f"}}]
    Endpoint(url, "m").answer(row("hi", tools=tools), 7)
    (sent,) = Engine.seen
    assert (sent["model"], sent["temperature"], sent["max_tokens"], sent["tools"]) == (
        "m",
        0,
        7,
        tools,
    )


def test_a_refused_request_shows_what_the_engine_said(url: str):
    with pytest.raises(EngineError, match=r"answered 400 for model 'm': .*too long"):
        list(Endpoint(url, "m").generate([row("refuse")], limits=[1], concurrent=1))


def test_a_reply_without_message_names_the_row(url: str):
    with pytest.raises(EngineError, match="answered row odd without a message"):
        Endpoint(url, "m").answer(row("odd"), 1)


def test_an_engine_that_is_gone_is_an_engine_error():
    with pytest.raises(
        EngineError, match=r"http://127\.0\.0\.1:9/v1/chat/completions cannot be reached"
    ):
        Endpoint("http://127.0.0.1:9", "m").answer(row("x"), 1)


def test_lm_eval_missing_names_tasks_and_the_way_out(tmp_path: Path):
    with pytest.raises(
        NotInstalledError,
        match=r"evaluate\.lm_eval asks for arc_easy, but lm-eval is not installed",
    ) as e:
        lm_eval.run(
            LmEvalSection(tasks=("arc_easy",)),
            "http://x",
            "m",
            tokenizer=tmp_path,
            output=tmp_path,
            concurrent=4,
        )
    assert "lm-eval[api]" in (e.value.hint or "")


def test_lm_eval_asks_the_served_endpoint(tmp_path: Path):
    section = LmEvalSection(tasks=("arc_easy", "piqa"), limit=10)
    url, tokenizer = "http://127.0.0.1:8000/v1", tmp_path / "model"
    words = lm_eval.command(
        section, url, "tuned", tokenizer=tokenizer, output=tmp_path / "out", concurrent=4
    )
    assert words[1:5] == ["-m", "lm_eval", "--model", "local-completions"]
    assert (
        f"model=tuned,base_url=http://127.0.0.1:8000/v1/completions,tokenizer={tmp_path / 'model'}"
        in words[6]
    )
    assert words[7:] == [
        "--tasks",
        "arc_easy,piqa",
        "--limit",
        "10",
        "--output_path",
        str(tmp_path / "out"),
    ]


def test_lm_eval_results_become_flat_numbers():
    results = {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 10}}
    assert lm_eval.flatten(results) == {"arc.acc": 0.5}
