"""The serve stage against a real process that behaves like an engine."""

import io
import json
import sys
from pathlib import Path

import pytest

from tests.folders import adapter_folder, model_folder
from toolkit.engines import ENGINES
from toolkit.errors import EngineError, ProofError
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Input, Interpreter, Kind, StageContext
from toolkit.stages.serve import Serve, ServeConfig

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the guard needs Linux"),
    # A detached guard outlives its Popen: that is what detaching means.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ENGINES._table, "vllm", "tests.unit.fake_engine:FakeEngine")
    monkeypatch.setenv("FAKE_VLLM_HAS_A_MEEK_CHILD", "1")


def folder(tmp_path: Path, name: str, **files: str) -> Path:
    path = tmp_path / name
    path.mkdir(exist_ok=True)
    for file, text in files.items():
        (path / file.replace("__", ".")).write_text(text)
    return path


def inputs(tmp_path, *, adapter=True, dataset=True):
    made = {"model": Input(model_folder(tmp_path / "model"), Kind.model, "0")}
    if adapter:
        path = adapter_folder(tmp_path / "adapter", r=4)
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


def test_the_run_keeps_a_certificate_of_what_was_proven(tmp_path):
    result, output, events = run(tmp_path)
    given = json.loads((output / "certificate.json").read_text())
    assert given["id"] == result.facts["certificate"]
    assert given["subject"]["fingerprints"] == {"model": "0", "adapter": "1"}
    (replica,) = given["proofs"]
    assert replica["adapters"][0]["name"] == "m"
    assert replica["adapters"][0]["agreement"] == "not checked", "these folders bring no logprobs"
    assert result.metrics["proof_effect"] > 0
    assert result.metrics["proof_seconds"] > 0
    assert "loading weights" in given["phases"]
    notes = [e["text"] for e in events if e["event"] == "note"]
    assert "effect of m" in notes
    assert any(note.startswith("proven: certificate ") for note in notes)


def test_an_adapter_that_does_nothing_fails_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.proof.effect.NOISE_FLOOR", 100.0)
    with pytest.raises(ProofError, match="m: the served adapter answers as its base does"):
        run(tmp_path)
    assert not (tmp_path / "output" / "answers.json").exists()
    assert list((tmp_path / "cache" / "guards").iterdir()) == [], "the engine was stopped"
