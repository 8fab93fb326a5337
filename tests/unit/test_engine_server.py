"""Supervision of a real process that behaves like an engine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toolkit.engines import ENGINES, guard, ports, records
from toolkit.engines.phases import PhaseReader
from toolkit.engines.server import running
from toolkit.errors import EngineError, NotInstalledError, UsageError
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Interpreter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard needs Linux")


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ENGINES._table, "fake", "tests.unit.fake_engine:FakeEngine")


def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    return folder


def serve(tmp_path, *args, on_phase=None, **section):
    return running(
        "fake",
        Interpreter(Path(sys.executable)),
        model(tmp_path),
        {},
        ServeSection(**({"port": 0, "extra_args": args} | section)),
        name="m",
        max_length=64,
        device="cpu",
        log=tmp_path / "engine.log",
        on_phase=on_phase,
    )


def child_of(log: Path) -> int:
    return int(
        next(line.split()[1] for line in log.read_text().splitlines() if line.startswith("child"))
    )


def gone(pid: int) -> bool:
    return guard.start_time(pid) is None


def test_a_healthy_server_answers_and_leaves_nothing(tmp_path):
    seen = []
    with serve(tmp_path, on_phase=lambda phase, _: seen.append(phase)) as server:
        assert server.client.models() == ["m"]
        assert server.client.chat("m", [{"role": "user", "content": "hi"}]).text == "m: hi"
        assert list(server.phases) == ["importing", "configuring", "loading weights"]
        assert 0.5 < server.start_seconds < 60
        server.check()
        pid, child = server.pid, child_of(server.log)
        assert not gone(child)
    assert gone(pid)
    assert gone(child)
    assert "configuring" in seen


def test_an_error_in_the_block_stops_the_server(tmp_path):
    with pytest.raises(ZeroDivisionError), serve(tmp_path):
        raise ZeroDivisionError
    assert gone(child_of(tmp_path / "engine.log"))


def test_a_failed_start_is_explained(tmp_path):
    with pytest.raises(EngineError, match=r"exit code 1: one sequence of 8192 tokens") as e:
        serve(tmp_path, "fails").__enter__()
    assert "engine.log" in e.value.hint


def test_an_unknown_failure_shows_the_end_of_the_log(tmp_path):
    with pytest.raises(EngineError, match=r"exit code 3\n.*\n?  \| something nobody has seen"):
        serve(tmp_path, "puzzles").__enter__()


def test_a_start_that_takes_too_long_is_broken_off(tmp_path):
    with pytest.raises(EngineError, match=r"not healthy after 5 s \(phase: configuring\)") as e:
        serve(tmp_path, "hangs", start_timeout_s=5).__enter__()
    assert "serve.start_timeout_s" in e.value.hint


def test_an_engine_that_dies_while_it_serves_is_noticed(tmp_path):
    with serve(tmp_path) as server:
        child = child_of(server.log)
        engine = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(engine, signal.SIGKILL)
        server.wait()
        with pytest.raises(EngineError, match="ended while it served with exit code 137"):
            server.check()
        assert gone(child)


def test_a_missing_interpreter_is_said_at_once(tmp_path):
    with (
        pytest.raises(NotInstalledError, match="no interpreter at /nowhere/python"),
        running(
            "fake", Interpreter(Path("/nowhere/python")), model(tmp_path), {}, ServeSection(port=0),
            name="m", max_length=64, device="cpu", log=tmp_path / "log",
        ),
    ):  # fmt: skip
        pass


def test_a_busy_port_is_refused_before_anything_starts(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} of 127.0.0.1 cannot be taken") as e:
            serve(tmp_path, port=port).__enter__()
    assert "serve.port" in e.value.hint
    assert not (tmp_path / "engine.log").exists()


def test_a_held_port_is_refused_to_others_and_open_to_the_engine():
    with ports.held(0) as port:
        with socket.socket() as stranger, pytest.raises(OSError, match="Address already in use"):
            stranger.bind(("127.0.0.1", port))
        with socket.socket() as engine:
            engine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            engine.bind(("127.0.0.1", port))
            engine.listen()
            with socket.create_connection(("127.0.0.1", port)) as client:
                accepted, address = engine.accept()
                accepted.close()
                assert address == client.getsockname()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_orphan_is_left_when_the_toolkit_is_killed(tmp_path, number):
    code = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from pathlib import Path
from toolkit.engines import ENGINES
from toolkit.engines.server import running
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Interpreter
import time
ENGINES._table["fake"] = "tests.unit.fake_engine:FakeEngine"
with running("fake", Interpreter(Path(sys.executable)), Path({str(model(tmp_path))!r}), {{}}, ServeSection(port=0),
             name="m", max_length=64, device="cpu", log=Path({str(tmp_path / "log")!r})) as server:
    print(server.pid, flush=True)
    time.sleep(300)
"""
    toolkit = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pid = int(toolkit.stdout.readline())
    child = child_of(tmp_path / "log")
    toolkit.send_signal(number)
    toolkit.wait(30)
    toolkit.stdout.close()
    deadline = time.monotonic() + 20
    while not (gone(pid) and gone(child)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_phases_are_timed_in_the_order_of_the_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("a\n")
    reader = PhaseReader((("one", "begin 1"), ("two", "begin 2")), log)
    reader.update()
    assert reader.current == "importing"
    with log.open("a") as file:
        file.write("xx begin 1 yy\nhalf a line: beg")
    reader.update()
    assert reader.current == "one"
    with log.open("a") as file:
        file.write("in 2\nbegin 1\n")
    reader.update()
    assert reader.current == "two"
    assert list(reader.seconds()) == ["importing", "one", "two"]


def record(pid: int, started: int, name: str = "m") -> records.ServerRecord:
    return records.ServerRecord(
        name, "http://127.0.0.1:1", {"m": "m"}, "vllm", "/m", pid, started, "/log", True
    )


def test_a_reused_process_id_is_not_taken_for_the_server(tmp_path):
    now = guard.start_time(os.getpid())
    records.write(tmp_path, record(os.getpid(), now))
    assert [r.name for r in records.living(tmp_path)] == ["m"]
    records.remove(tmp_path, "m")
    records.write(tmp_path, record(os.getpid(), now - 1))
    assert records.living(tmp_path) == []
    assert list(tmp_path.glob("*.json")) == []


def test_two_servers_cannot_have_one_name(tmp_path):
    mine = record(os.getpid(), guard.start_time(os.getpid()))
    records.write(tmp_path, mine)
    with pytest.raises(EngineError, match="a server named 'm' runs already") as e:
        records.write(tmp_path, mine)
    assert "toolkit serve --stop m" in e.value.hint


def test_picking_a_server_says_what_runs(tmp_path):
    with pytest.raises(UsageError, match="no server of"):
        records.pick(tmp_path, None)
    started = guard.start_time(os.getpid())
    records.write(tmp_path, record(os.getpid(), started, "tickets"))
    assert records.pick(tmp_path, None).name == "tickets"
    with pytest.raises(
        UsageError, match=r"no server named 'tikets' runs \(did you mean 'tickets'\?\)"
    ):
        records.pick(tmp_path, "tikets")
    records.write(tmp_path, record(os.getpid(), started, "other"))
    with pytest.raises(UsageError, match="several servers run: other, tickets"):
        records.pick(tmp_path, None)
