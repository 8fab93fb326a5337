"""``toolkit adapters`` on a whole server: supervisor, front and (fake) engines, with requests from outside."""

import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner

from tests.adapter_folders import write_adapter, write_base
from tests.serving import PROGRAM, ask, environ, spec, wait_for
from toolkit.cli import toolkit as command_line
from toolkit.engines import records
from toolkit.engines.client import Client
from toolkit.engines.foreground import serve
from toolkit.serving.desired import read_spec

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="the guard needs Linux"),
]

STREAMS = 32


class World:
    """A detached server ``m`` with one adapter, ``tickets``, and folders of other versions."""

    def __init__(self, folder, **section):
        self.folder = folder
        self.first = read_spec("tickets", write_adapter(folder / "first", seed=1))
        self.second = read_spec("tickets", write_adapter(folder / "second", seed=2))
        self.made = spec(folder, adapters=[self.first], **{"adapter_slots": 4} | section)
        (folder / "model" / "config.json").unlink()
        (folder / "model").rmdir()
        write_base(folder / "model")
        self.start()

    def start(self):
        self.record = serve(
            self.made,
            detach=True,
            on_event=lambda _: None,
            on_ready=lambda _: None,
            program=PROGRAM,
        )

    def stop(self):
        for record in records.living(self.made.place.parent):
            records.stop(self.made.place.parent, record)

    def toolkit(self, *words):
        place = ["--workspace", str(self.folder)]
        return CliRunner().invoke(command_line, ["adapters", *words, *place])

    def did(self, *words):
        done = self.toolkit(*words)
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    def rows(self):
        rows = json.loads(self.did("list", "--json"))["adapters"]
        return [(row["name"], row["label"], row["version"]) for row in rows]

    def answers(self, name="tickets"):
        """The version that answers: the fake engine begins with the name it was asked by."""
        status, answer = ask(self.record.url, name)
        assert status == 200, answer
        return answer["choices"][0]["message"]["content"].partition(":")[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_CACHE", str(folder / "cache"))
        patch.setenv("PYTHONPATH", environ()["PYTHONPATH"])
        made = World(folder)
        yield made
        made.stop()


@pytest.fixture
def world(server):
    """With the first version."""
    yield server
    if server.rows() != [("tickets", "stable", server.first.version)]:
        server.did("swap", "tickets", str(server.first.place))


def test_a_swap_by_command_under_32_streams_loses_nothing(world):
    assert world.answers() == world.first.lora_name
    seen, stop = [], threading.Event()

    def client(number):
        while not stop.is_set():
            began = time.monotonic()
            deltas = Client(world.record.url).stream(
                "tickets", [{"role": "user", "content": str(number)}], max_tokens=12
            )
            seen.append((began, "".join(delta.text for delta in deltas)))

    with ThreadPoolExecutor(STREAMS) as pool:
        clients = [pool.submit(client, number) for number in range(STREAMS)]
        try:
            time.sleep(1)
            change = json.loads(world.did("swap", "tickets", str(world.second.place), "--json"))
            swapped = time.monotonic()
            time.sleep(1)
        finally:
            stop.set()
        for done in clients:
            done.result()  # an error of a stream would be raised here

    assert change["loaded"] == [world.second.lora_name]
    assert change["unloaded"] == [world.first.lora_name]
    assert change["cut"] == 0
    versions = {text.partition(":")[0] for _, text in seen}
    assert versions == {world.first.lora_name, world.second.lora_name}
    assert all(text.endswith(" t11") for _, text in seen)
    late = {text.partition(":")[0] for began, text in seen if began > swapped}
    assert late == {world.second.lora_name}
    assert world.rows() == [("tickets", "stable", world.second.version)]


def test_a_refused_proof_ends_with_1_and_changes_nothing(world):
    bad = write_adapter(world.folder / "bad", seed=9)
    (bad / "unproven").touch()
    done = world.toolkit("swap", "tickets", str(bad))
    assert done.exit_code == 1
    assert done.exception.exit_code == 1
    assert done.exception.message == "tickets: it answers as the base does"
    assert done.exception.hint == "is it all zeros?"
    assert world.answers() == world.first.lora_name
    assert world.rows() == [("tickets", "stable", world.first.version)]


def test_names_come_and_go(world):
    other = write_adapter(world.folder / "other", seed=7)
    loaded = world.toolkit("load", "billing", str(other))
    assert loaded.exit_code == 0, loaded.output
    assert "effect 0.38 nats a token" in loaded.stderr
    assert "agreement with the training side NOT CHECKED: it brings no stored" in loaded.stderr
    assert world.answers("billing").startswith("billing@")
    table = world.did("list")
    assert "billing" in table
    assert "2 of 4 slots, ranks up to 4" in table
    world.did("unload", "billing")
    status, answer = ask(world.record.url, "billing")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_a_canary_is_asked_for_and_promoted(world):
    world.did("canary", "tickets", str(world.second.place), "--weight", "0")
    assert [label for _, label, _ in world.rows()] == ["stable", "canary"]
    assert {world.answers() for _ in range(5)} == {world.first.lora_name}
    world.did("promote", "tickets")
    assert world.answers() == world.second.lora_name


def test_what_was_swapped_in_survives_a_killed_engine_and_a_killed_server(world):
    world.did("swap", "tickets", str(world.second.place))
    engine = next(p for p in world.record.status().parts if p.name == "replica-0")
    os.kill(engine.pid, signal.SIGKILL)
    wait_for(lambda: _restarts(world) == 1 and ask(world.record.url, "tickets")[0] == 200)
    assert world.answers() == world.second.lora_name

    os.kill(world.record.pid, signal.SIGKILL)
    wait_for(lambda: not world.record.lives)
    world.start()
    assert world.answers() == world.second.lora_name
    assert world.rows() == [("tickets", "stable", world.second.version)]


def test_an_engine_that_restarts_without_adapters_takes_the_next_one(tmp_path, monkeypatch):
    """Its room is the server's, not that of the adapters which are loaded at that moment."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", environ()["PYTHONPATH"])
    world = World(tmp_path, adapter_slots=None)
    try:
        world.did("unload", "tickets")
        engine = next(p for p in world.record.status().parts if p.name == "replica-0")
        os.kill(engine.pid, signal.SIGKILL)
        wait_for(lambda: _restarts(world) == 1 and ask(world.record.url, "m-base")[0] == 200)
        assert "0 of 2 slots, ranks up to 4" in world.did("list")
        world.did("load", "tickets", str(world.second.place))
        assert world.answers() == world.second.lora_name

        world.did("unload", "tickets")  # and so does a server that starts with none of its own
        world.stop()
        world.start()
        world.did("load", "tickets", str(world.first.place))
        assert world.answers() == world.first.lora_name
    finally:
        world.stop()


def _restarts(world):
    return next(p for p in world.record.status().parts if p.name == "replica-0").restarts
