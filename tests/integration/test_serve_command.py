"""``toolkit serve`` around a supervisor with fake engines: followed, detached, asked, stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.serving import PROGRAM, adapter, ask, environ, gone, spec, wait_for
from toolkit.cli import toolkit as command_line
from toolkit.engines import guard, records
from toolkit.engines.foreground import serve
from toolkit.errors import EngineError, ProofError
from toolkit.serving.state import InterpreterSpec

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="the guard needs Linux"),
]


@pytest.fixture(autouse=True)
def own_place(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", environ()["PYTHONPATH"])


def start(made, *, detach=False, on_ready=lambda _: None):
    events = []
    record = serve(made, detach=detach, on_event=events.append, on_ready=on_ready, program=PROGRAM)
    return record, [event["event"] for event in events]


def toolkit(*args) -> str:
    result = CliRunner().invoke(command_line, ["serve", *args])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_detached_server_outlives_its_command_and_is_found_and_stopped(tmp_path):
    record, events = start(spec(tmp_path, adapters=[adapter(tmp_path / "a")]), detach=True)
    assert events[-1] == "ready"
    assert list(record.models.values()) == ["m-base", "tickets"]
    assert ask(record.url, "tickets")[0] == 200

    shown = json.loads(toolkit("--status", "--json", "--workspace", str(tmp_path)))[0]
    assert shown["status"]["ready"]
    assert [part["name"] for part in shown["status"]["parts"]] == ["front", "replica-0"]
    table = toolkit("--status", "--workspace", str(tmp_path))
    assert "m-base, tickets" in table
    assert "replica-0" in table

    said = CliRunner().invoke(
        command_line,
        ["chat", "--json", "-m", "hello", "--workspace", str(tmp_path)],
        standalone_mode=False,
    )
    assert said.exception is None, said.exception
    assert json.loads(said.output)["answer"].endswith(": hello")
    for file in (tmp_path / "servers" / "m.json", *(tmp_path / "servers" / "m").glob("*.json*")):
        assert file.stat().st_mode & 0o077 == 0, file

    family = guard.descendants(record.pid) | {record.pid}
    with pytest.raises(EngineError, match="a server named 'm' runs already") as e:
        start(spec(tmp_path))
    assert "toolkit serve --stop m" in e.value.hint
    assert "stopped m" in toolkit("--stop", "--drain", "1", "--workspace", str(tmp_path))
    assert gone(family)
    assert "no server" in toolkit("--status", "--workspace", str(tmp_path))


def test_sigterm_to_the_command_ends_a_foreground_server_in_order(tmp_path):
    def stop(_record):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    record, events = start(spec(tmp_path), on_ready=stop)
    assert events[-1] == "stopped"
    assert "draining" in events
    assert not record.lives


def test_a_failed_proof_is_an_error_of_the_command(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "unproven").touch()
    with pytest.raises(ProofError, match="m: token 3 differs") as e:
        start(spec(tmp_path), detach=True)
    assert e.value.exit_code == 1
    assert e.value.hint == "export it again"


def test_a_missing_router_is_said_before_anything_starts(tmp_path):
    with pytest.raises(Exception, match="need the environment 'router'") as e:
        start(spec(tmp_path, replicas=2))
    assert (e.value.exit_code, e.value.hint) == (3, "toolkit env sync router")


def test_a_missing_interpreter_of_the_engine_ends_the_start(tmp_path):
    made = replace(spec(tmp_path), engine=InterpreterSpec("/nowhere/python"))
    with pytest.raises(Exception, match="no interpreter at /nowhere/python") as e:
        start(made)
    assert e.value.exit_code == 3


def test_a_supervisor_that_is_killed_is_told_by_its_command(tmp_path):
    killed = []

    def kill(record):
        killed.append(guard.descendants(record.pid))
        os.kill(record.pid, signal.SIGKILL)

    with pytest.raises(EngineError, match="the supervisor of 'm' was killed by signal 9"):
        start(spec(tmp_path), on_ready=kill)
    wait_for(lambda: gone(killed[0]), 10)


def test_a_command_that_was_stopped_holds_its_server_up_in_nothing(tmp_path):
    """Ctrl-Z: its pipe is full (4 KiB here) while the engine is killed, started again, and the server is stopped."""
    made = spec(tmp_path)
    made.write()
    code = f"""
import functools, subprocess, sys; sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
subprocess.Popen = functools.partial(subprocess.Popen, pipesize=4096)
from pathlib import Path
from tests.serving import PROGRAM
from toolkit.engines.foreground import serve
from toolkit.serving.state import ServerSpec
serve(ServerSpec.read(Path({made.folder!r})), detach=False, on_event=lambda e: print(e["event"], flush=True),
      on_ready=lambda r: print(r.pid, flush=True), program=PROGRAM)
"""
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ()
    )
    pid = next(int(line) for line in command.stdout if line.strip().isdigit())
    os.kill(command.pid, signal.SIGSTOP)
    record = records.pick(made.place.parent, None)
    for lives in range(1, 4):
        engine = next(p for p in record.status().parts if p.name == "replica-0")
        os.kill(engine.pid, signal.SIGKILL)
        wait_for(lambda n=lives: (s := record.status()).ready and s.parts[1].restarts == n)
    family = guard.descendants(pid) | {pid}
    assert made.place.joinpath("events.jsonl").stat().st_size > 2 * 4096
    records.stop(made.place.parent, record, 1)
    wait_for(lambda: gone(family - {pid}))
    os.kill(command.pid, signal.SIGCONT)
    said = command.stdout.read()
    command.stdout.close()
    assert command.wait() == 0
    assert said.splitlines()[-1] == "stopped"


def test_ctrl_c_before_it_is_ready_gives_130_and_leaves_nothing(tmp_path):
    made = spec(tmp_path, "hangs")
    made.write()
    code = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from pathlib import Path
from tests.serving import PROGRAM
from toolkit.engines.foreground import serve
from toolkit.serving.state import ServerSpec
try:
    serve(ServerSpec.read(Path({made.folder!r})), detach=True, on_event=lambda e: print(e, flush=True),
          on_ready=lambda r: None, program=PROGRAM)
except KeyboardInterrupt:
    sys.exit(130)
"""
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ()
    )
    for line in command.stdout:
        if "configuring" in line:
            break
    family = guard.descendants(command.pid)
    command.send_signal(signal.SIGINT)
    assert command.wait(60) == 130
    command.stdout.close()
    assert gone(family)


def store(tmp_path, uri: str) -> dict:
    return {
        "uri": uri, "artifact_root": str(tmp_path / "mlartifacts"),
        "outboxes": str(tmp_path / "tracking"),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:The ``noload`` loader")
def test_a_start_is_an_mlflow_run_with_its_phases_and_certificate(tmp_path):
    from mlflow import MlflowClient

    from toolkit.tracking import sync

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri)
    client.search_experiments()  # the store is there: `toolkit serve` ran the recipe's steps before
    made = replace(spec(tmp_path), store=store(tmp_path, uri), experiment="tickets")
    record, _ = start(made, detach=True)
    toolkit("--stop", "--drain", "0", "--workspace", str(tmp_path))
    sync(tmp_path / "tracking")  # what did not get there in ten seconds

    experiment = client.get_experiment_by_name("tickets")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage"] == "serve-live"
    assert run.data.tags["toolkit.url"] == record.url
    assert run.data.metrics["startup.total"] >= run.data.metrics["startup.importing"] > 0
    assert "certificate.json" in {file.path for file in client.list_artifacts(run.info.run_id)}
    assert list((tmp_path / "tracking").glob("*/outbox.jsonl")) == []


def test_a_lost_store_does_not_stop_a_server(tmp_path):
    made = replace(spec(tmp_path), store=store(tmp_path, "http://127.0.0.1:9"))
    record, _ = start(made, detach=True)
    assert ask(record.url)[0] == 200
    assert "stopped m" in toolkit("--stop", "--drain", "0", "--workspace", str(tmp_path))
    assert len(list((tmp_path / "tracking").glob("*/outbox.jsonl"))) == 1  # for a later replay
