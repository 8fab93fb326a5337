"""A stage's process hands back its numbers, or its own error; a real ``fetch`` of a tiny folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_fetch import CONFIG, write_safetensors
from toolkit import stage_process
from toolkit.errors import ModelError, StepFailedError
from toolkit.stage_process import Outcome, run_stage
from toolkit.tracking import Store
from toolkit.worker import StepSpec, main, probe_step
from toolkit.workspace import private_folder


def spec(root: Path, python: str = sys.executable, **config: Any) -> StepSpec:
    environment = {"python": python, "pythonpath": [], "variables": {}, "lock": None, "digest": "0"}
    return StepSpec(
        recipe="r",
        recipe_path=str(root / "r.yaml"),
        recipe_dir=str(root),
        step="fetch",
        stage="fetch",
        kind="model",
        fingerprint="f" * 64,
        identity={},
        config={"source": "./model"} | config,
        inputs={},
        artifact=str(root / "artifact"),
        state=str(root / "state"),
        device="cpu",
        environments={"train": environment},
        store=Store("sqlite:///nowhere.db", None, root / "outboxes").described(),
        experiment="r",
        parent_run=None,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    model = private_folder(tmp_path / "model")
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "tokenizer.json").write_text("{}")
    write_safetensors(model / "model.safetensors", {"embed": [8, 4]})
    private_folder(tmp_path / "artifact.part")
    return tmp_path


def run(step: StepSpec) -> tuple[Outcome, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    return run_stage(step, step.write(), lambda event: events.append(dict(event))), events


def test_a_stage_hands_back_metrics_facts_and_what_it_cost(root: Path) -> None:
    outcome, events = run(spec(root))
    assert outcome.metrics == {"parameters": 32}
    assert outcome.facts["source"] == "./model"
    assert outcome.seconds > 0
    assert outcome.peak_memory_gib > 0
    assert {"event": "note", "text": "LlamaForCausalLM, 0 M parameters, BF16"} in events
    assert any("this environment has no torch" in event.get("text", "") for event in events)


def test_a_stage_fails_with_its_own_error_and_the_name_of_the_step(root: Path) -> None:
    with pytest.raises(ModelError, match="step fetch: model folder not found: ") as caught:
        run(spec(root, source="./elsewhere"))
    assert caught.value.hint == "check model.source in the recipe; it is relative to it"


def test_a_process_that_says_nothing_fails_with_the_last_line_of_its_log(root: Path) -> None:
    python = root / "python"
    python.write_text("#!/bin/sh\necho no torch here >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(
        StepFailedError, match="step fetch: its process ended with 3: no torch here"
    ) as caught:
        run(spec(root, python=str(python)))
    assert caught.value.hint == f"its log is {root / 'state' / 'log.txt'}"


def test_a_stage_is_told_the_store_that_runs_go_to(root: Path) -> None:
    python = root / "python"
    python.write_text(f'#!/bin/sh\necho "$MLFLOW_TRACKING_URI"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert os.environ.get("MLFLOW_TRACKING_URI") != "sqlite:///nowhere.db"
    run(spec(root, python=str(python)))
    assert (root / "state" / "log.txt").read_text().startswith("sqlite:///nowhere.db\n")


def test_a_probe_measures_and_keeps_nothing(root: Path) -> None:
    before = sorted(root.iterdir())
    outcome = probe_step(spec(root), lambda *_: None)
    assert outcome.facts["architecture"] == CONFIG["architectures"][0]
    assert sorted(root.iterdir()) == before


def test_a_probe_that_fails_leaves_its_log(root: Path) -> None:
    (root / "model" / "config.json").unlink()
    with pytest.raises(ModelError):
        probe_step(spec(root), lambda *_: None)
    assert (root / "state-probe" / "log.txt").is_file()
    assert not (root / "artifact-probe.part").exists()


def test_another_node_only_lends_its_processes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step_file = spec(root).write()
    monkeypatch.setenv("TOOLKIT_NODE", "1")
    monkeypatch.setenv("TOOLKIT_PARENT", str(os.getpid()))
    kept = signal.getsignal(signal.SIGTERM)
    assert main([str(step_file)]) == 0
    signal.signal(signal.SIGTERM, kept)
    assert not (root / "artifact").exists()
    assert not (root / "nowhere.db").exists()


@pytest.mark.parametrize(("grace_s", "code"), [("30", 0), ("0.5", -signal.SIGKILL)])
def test_a_stage_has_the_jobs_grace_for_its_checkpoint(
    grace_s: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), sys.exit(0)))\n"
        "print('up', flush=True); time.sleep(60)"
    )
    argv = [sys.executable, "-c", script]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    monkeypatch.setenv("TOOLKIT_GRACE_S", grace_s)
    stage_process._stop(process)
    process.stdout.close()
    assert process.returncode == code
