"""The serve stage and ``serve_model`` against a real process that behaves like an engine."""

import io
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from toolkit.cli import toolkit
from toolkit.engines import ENGINES, guard, records
from toolkit.engines.foreground import serve_model
from toolkit.errors import EngineError, UsageError
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Input, Interpreter, Kind, StageContext
from toolkit.stages.serve import Serve, ServeConfig
from toolkit.workspace import Workspace

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the guard needs Linux"),
    # A detached guard outlives its Popen: that is what detaching means.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ENGINES._table, "vllm", "tests.unit.fake_engine:FakeEngine")


def folder(tmp_path: Path, name: str, **files: str) -> Path:
    path = tmp_path / name
    path.mkdir(exist_ok=True)
    for file, text in files.items():
        (path / file.replace("__", ".")).write_text(text)
    return path


def inputs(tmp_path, *, adapter=True, dataset=True):
    made = {"model": Input(folder(tmp_path, "model", config__json="{}"), Kind.model, "0")}
    if adapter:
        path = folder(tmp_path, "adapter", adapter_config__json='{"r": 4}')
        made["adapter"] = Input(path, Kind.adapter, "1")
    if dataset:
        rows = [
            {
                "id": "0",
                "messages": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "m: hi"},
                ],
            },
            {"id": "1", "text": "plain"},
            {
                "id": "2",
                "messages": [
                    {"role": "user", "content": "ho"},
                    {"role": "assistant", "content": "no"},
                ],
            },
            {
                "id": "3",
                "messages": [
                    {"role": "user", "content": "he"},
                    {"role": "assistant", "content": "no"},
                ],
            },
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        made["dataset"] = Input(folder(tmp_path, "dataset", heldout__jsonl=text), Kind.dataset, "2")
    return made


def run(tmp_path, *, system=None, given=None, **section):
    events = io.StringIO()
    output = folder(tmp_path, "output")
    ctx = StageContext(
        inputs=inputs(tmp_path) if given is None else given,
        output=output,
        state=tmp_path,
        recipe_dir=tmp_path,
        interpreters={"vllm": Interpreter(Path(sys.executable))},
        events=events,
    )
    config = ServeConfig(
        subject="tuned", name="m", serve=ServeSection(**section), max_length=64, system=system
    )
    result = Serve().run(config, ctx)
    return result, output, [json.loads(line) for line in events.getvalue().splitlines()]


def test_adapter_and_base_are_asked_the_first_held_out_rows(tmp_path):
    result, output, events = run(tmp_path)
    answers = json.loads((output / "answers.json").read_text())
    assert [(a["model"], a["question"], a["answer"]) for a in answers] == [
        ("m-base", "hi", "m-base: hi"), ("m-base", "ho", "m-base: ho"), ("m", "hi", "m: hi"), ("m", "ho", "m: ho"),
    ]  # fmt: skip
    assert result.metrics["exact_match"] == 0.5, "of the adapter's answers, not of the base's"
    assert result.metrics["answers"] == 4
    assert result.metrics["start_seconds"] > 0.5
    assert result.facts["models"] == ["m-base", "m"]
    assert json.loads((output / "startup.json").read_text())["phases"]["importing"] > 0
    assert "Starting to load model" in (output / "engine.log").read_text()
    phases = [
        e["shown"]["phase"] for e in events if e["event"] == "progress" and "phase" in e["shown"]
    ]
    assert "configuring" in phases


def test_the_recipes_questions_come_with_its_system_prompt(tmp_path):
    given = inputs(tmp_path, adapter=False)
    result, output, _ = run(tmp_path, given=given, questions=("who?",), system="Be brief.")
    answers = json.loads((output / "answers.json").read_text())
    assert [(a["model"], a["answer"], a["expected"]) for a in answers] == [("m", "m: who?", None)]
    assert "exact_match" not in result.metrics


def test_a_busy_port_of_the_recipe_does_not_stop_the_proof(tmp_path):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result, _, _ = run(tmp_path, port=other.getsockname()[1])
    assert result.metrics["answers"] == 4


def test_a_model_that_says_nothing_fails_the_stage(tmp_path):
    with pytest.raises(
        EngineError, match=r"2 of 2 answers are empty; 'm' said nothing to 'hi'"
    ) as caught:
        run(tmp_path, extra_args=("silent",))
    assert "chat template" in caught.value.hint
    assert (tmp_path / "output" / "answers.json").exists()


def test_without_a_question_nothing_is_started(tmp_path):
    with pytest.raises(EngineError, match="there is nothing to ask") as caught:
        run(tmp_path, given=inputs(tmp_path, dataset=False))
    assert "serve.questions" in caught.value.hint
    assert not (tmp_path / "output" / "engine.log").exists()


def start(tmp_path, *, detach, on_ready, **section):
    return serve_model(
        inputs(tmp_path),
        ServeSection(**({"port": 0} | section)),
        Interpreter(Path(sys.executable)),
        name="m",
        max_length=64,
        device="cpu",
        recipe_dir=tmp_path,
        workspace=Workspace(tmp_path / "runs"),
        detach=detach,
        on_phase=lambda *_: None,
        on_ready=on_ready,
    )


def command(tmp_path, which, *args):
    return CliRunner().invoke(
        toolkit, [which, *args, "--workspace", str(tmp_path / "runs")], standalone_mode=False
    )


def test_a_detached_server_is_listed_asked_and_stopped_by_other_commands(tmp_path):
    record = start(tmp_path, detach=True, on_ready=lambda _: None)
    try:
        assert record.lives
        listed = json.loads(command(tmp_path, "serve", "--status", "--json").output)
        assert [(s["name"], s["url"], s["models"]) for s in listed] == [
            ("m", record.url, {"m-base": "m-base", "m": "m"})
        ]
        said = command(tmp_path, "chat", "--json", "-m", "hello")
        assert said.exception is None, said.exception
        assert json.loads(said.output)["answer"] == "m: hello"
        with pytest.raises(EngineError, match="a server named 'm' runs already"):
            start(tmp_path, detach=True, on_ready=lambda _: None)
    finally:
        stopped = command(tmp_path, "serve", "--stop", "m")
    assert "stopped m" in stopped.output
    assert not record.lives
    assert command(tmp_path, "serve", "--status").output.startswith("no server of")
    assert list((tmp_path / "cache" / "guards").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_foreground_server_ends_cleanly_on_ctrl_c_and_sigterm(tmp_path, number):
    def soon(_):
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()

    record = start(tmp_path, detach=False, on_ready=soon)
    assert not record.lives
    assert records.living(tmp_path / "runs" / "servers") == []


def test_a_foreground_server_can_be_stopped_from_elsewhere(tmp_path):
    def soon(record):
        threading.Timer(0.5, os.kill, (record.pid, signal.SIGTERM)).start()

    assert not start(tmp_path, detach=False, on_ready=soon).lives


def test_sigterm_before_it_is_healthy_breaks_off_the_start(tmp_path):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, detach=False, on_ready=lambda _: None, extra_args=("hangs",))
    assert list((tmp_path / "cache" / "guards").iterdir()) == []


def test_a_foreground_server_whose_engine_dies_is_an_error(tmp_path):
    def kill(record):
        printed = Path(record.log).read_text().splitlines()
        child = int(next(line.split()[1] for line in printed if line.startswith("child")))
        os.kill(
            int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1]),
            signal.SIGKILL,
        )

    with pytest.raises(EngineError, match="ended while it served with exit code 137"):
        start(tmp_path, detach=False, on_ready=kill)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((), "RECIPE is missing"),
        (("--stop", "m", "--status"), "--stop and --status stand alone"),
        (("--stop",), "no server of"),
    ],
)
def test_a_wrong_command_is_said_to_be_wrong(tmp_path, args, text):
    result = command(tmp_path, "serve", *args)
    assert isinstance(result.exception, UsageError)
    assert text in result.exception.message


def test_json_without_a_message_is_refused(tmp_path):
    result = command(tmp_path, "chat", "--json")
    assert "--json needs --message" in result.exception.message


def test_the_log_and_the_record_are_for_their_owner_alone(tmp_path):
    record = start(tmp_path, detach=True, on_ready=lambda _: None)
    records.stop(tmp_path / "runs" / "servers", record)
    assert Path(record.log).parent.stat().st_mode & 0o077 == 0
    assert guard.start_time(record.pid) is None
