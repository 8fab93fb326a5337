"""The pure parts of supervision: budgets, GPUs, commands, tables, states."""

import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.engines import Deployment
from toolkit.errors import EngineError, ProofError
from toolkit.recipe.serve import ServeSection
from toolkit.serving import gpus, router
from toolkit.serving.control import ControlServer, forget_sockets, request, socket_folder
from toolkit.serving.events import Events, last
from toolkit.serving.gpus import Gpu
from toolkit.serving.proofs import NO_ANSWER, _options
from toolkit.serving.replicas import TOKENS
from toolkit.serving.restarts import Restarts
from toolkit.serving.state import AdapterSpec, InterpreterSpec, PartState, ServerSpec, ServerStatus


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_restarts_wait_longer_each_time_and_end():
    restarts = Restarts(limit=4, clock=Clock())
    assert [restarts.next_delay() for _ in range(5)] == [0, 1, 2, 4, None]
    assert restarts.total == 4
    assert restarts.spent == "4 restarts in 10 minutes"


def test_restarts_of_long_ago_are_forgiven():
    clock = Clock()
    restarts = Restarts(limit=2, clock=clock)
    assert [restarts.next_delay() for _ in range(3)] == [0, 1, None]
    clock.now = 601
    assert restarts.next_delay() == 0


def gpu(index: int, free: int = 80_000, total: int = 81_559) -> Gpu:
    return Gpu(str(index), f"GPU-{index}abc", total, free)


FOUR = [gpu(n) for n in range(4)]


def test_nvidia_smi_is_read():
    text = "0, GPU-aa, 81559, 81040, Disabled\n1, GPU-bb, 81559, 40000, [N/A]\n"
    assert gpus.read(text) == [Gpu("0", "GPU-aa", 81559, 81040), Gpu("1", "GPU-bb", 81559, 40000)]


@pytest.mark.parametrize(
    ("given", "indices"),
    [
        (None, "0123"),
        ("2,0", "20"),
        ("GPU-3abc", "3"),
        ("GPU-3", "3"),
        ("GPU-2abc, 1", "21"),
        ("GPU-9", ""),
        ("3abc", ""),
        ("MIG-0", ""),
        ("", ""),
        ("1,nine,2", "1"),
    ],
)
def test_only_visible_gpus_are_used(given, indices):
    environ = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    assert "".join(g.index for g in gpus.visible(FOUR, environ)) == indices


def test_no_gpu_belongs_to_two_replicas():
    assert [[g.index for g in part] for part in gpus.slices(FOUR, 2, 2)] == [["0", "1"], ["2", "3"]]


def test_too_few_gpus_are_counted_in_the_error():
    with pytest.raises(EngineError, match="3 replicas of 2 GPUs each need 6 GPUs, but 4 are") as e:
        gpus.slices(FOUR, 3, 2)
    assert "serve.replicas to 2" in e.value.hint


def test_a_replica_takes_tensor_parallel_gpus():
    assert gpus.gpus_per_replica(ServeSection(tensor_parallel=4)) == 4


def test_a_free_gpu_gives_what_the_recipe_asks():
    assert gpus.room([gpu(0)], 0.9, 16_000, free_at_start=True) == gpus.Room(0.9)


def test_a_half_full_gpu_gives_less_and_says_the_numbers():
    room = gpus.room([gpu(0), gpu(1, free=41_000)], 0.9, 16_000, free_at_start=True)
    assert room.fraction == 0.49
    assert room.shrunk == (
        "GPU 1 has 40.0 of 79.6 GiB free (others hold 39.6): serve.memory_fraction 0.9 becomes 0.49"
    )
    assert gpus.room([gpu(0, free=41_000)], 0.9, 16_000, free_at_start=False) == gpus.Room(0.9)


@pytest.mark.parametrize("free_at_start", [True, False])
def test_a_gpu_too_full_for_the_weights_is_refused_with_the_numbers(free_at_start):
    with pytest.raises(EngineError) as e:
        gpus.room([gpu(0, free=12_000)], 0.9, 16_000, free_at_start=free_at_start)
    assert e.value.message == (
        "GPU 0 has 11.7 of 79.6 GiB free (others hold 67.9), but the model needs at least 19.0 GiB there"
    )
    assert "nvidia-smi" in e.value.hint


def test_weights_are_counted_in_files(tmp_path):
    for name in ("a.safetensors", "b.safetensors", "other.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(3 * 2**20)
    assert gpus.weights_mib(tmp_path) == 6


def test_every_address_of_the_router_is_loopback():
    argv = router.arguments(Path("/p"), 1, 2, ["http://127.0.0.1:3"])
    flags = dict(itertools.pairwise(argv))
    assert (flags["--host"], flags["--prometheus-host"]) == ("127.0.0.1", "127.0.0.1")
    assert (flags["--port"], flags["--prometheus-port"]) == ("1", "2")
    assert flags["--worker-urls"] == "http://127.0.0.1:3"


def spec(tmp_path) -> ServerSpec:
    return ServerSpec(
        name="tickets", subject="tuned", folder=str(tmp_path), model=str(tmp_path), model_version="a" * 16,
        base_name="tickets-base", max_length=64, device="cpu",
        serve=ServeSection(drain_s=7).model_dump(mode="json"),
        engine=InterpreterSpec("/python", ("/a",), {"X": "1"}), router=InterpreterSpec("/r"),
        adapters=(AdapterSpec("tickets", "/a", "b" * 16),), tuning={"poll_s": 1.0},
    )  # fmt: skip


def test_a_deployment_survives_the_disk_and_is_for_its_owner_alone(tmp_path):
    written = spec(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    file = written.write()
    assert ServerSpec.read(tmp_path) == written
    assert file.stat().st_mode & 0o777 == 0o600
    assert written.section.drain_s == 7


def test_the_name_of_the_base_does_not_hang_on_the_adapters_that_are_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    deployment = spec(tmp_path).deployment(())
    assert isinstance(deployment, Deployment)
    assert deployment.base_name == "tickets-base"


def test_where_and_for_whom_a_server_serves_changes_no_answer(tmp_path):
    assert set(ServeSection.model_fields) > NO_ANSWER
    one = spec(tmp_path)
    moved = {
        "port": 9,
        "replicas": 3,
        "engines": ["http://h:1"],
        "max_concurrent": 8,
        "front": {"keys": True},
        "name": "other",
    }
    assert _options(replace(one, name="b", serve={**one.serve, **moved})) == _options(one)
    for other in (
        {"seed": 1},
        {"dtype": "fp16"},
        {"kv_cache_type": "fp8"},
        {"extra_args": ["--x"]},
    ):
        assert _options(replace(one, serve={**one.serve, **other})) != _options(one)
    assert _options(replace(one, engine_digest="other lock")) != _options(one)


def test_a_status_survives_json():
    part = PartState("front", "ready", 7, 1, "http://x")
    status = ServerStatus("m", "http://x", True, None, ("m",), "vllm", 3, (part,), {"m": 2}, {})
    assert ServerStatus.from_json(json.loads(json.dumps(status, default=vars))) == status


def test_counters_of_both_engines_are_found():
    text = (
        "# HELP vllm:generation_tokens_total x\n"
        'vllm:generation_tokens_total{model_name="m"} 12.0\n'
        "vllm:prompt_tokens_total 3.0\nhttp_requests_total 9\n"
        'sglang:generation_tokens_total{x="y z"} 5\n'
    )
    assert TOKENS.findall(text) == ["12.0", "3.0", "5"]


@pytest.fixture
def control():
    def handle(method, path, body):
        if path == "/fails":
            raise ProofError("token 3 differs", "export it again")
        return 200, {"method": method, "path": path, "body": body}

    folder = socket_folder()
    server = ControlServer(folder / "supervisor", handle)
    yield folder / "supervisor"
    server.close()
    forget_sockets(folder / "supervisor")
    assert not folder.exists()


def test_the_control_socket_answers_json_to_its_owner_alone(control):
    answer = request(control, "POST", "/stop?x=1", {"drain_s": 3})
    assert answer == {"method": "POST", "path": "/stop", "body": {"drain_s": 3}}
    assert control.stat().st_mode & 0o077 == 0
    assert control.parent.stat().st_mode & 0o077 == 0


def test_an_error_passes_the_control_socket_with_its_hint(control):
    with pytest.raises(EngineError, match="token 3 differs") as e:
        request(control, "POST", "/fails")
    assert e.value.hint == "export it again"


def test_a_dead_control_socket_is_said(tmp_path):
    with pytest.raises(EngineError, match="the server does not answer") as e:
        request(tmp_path / "gone", "GET", "/status")
    assert "toolkit serve --status" in e.value.hint


def test_a_long_temporary_folder_does_not_make_a_long_socket(tmp_path, monkeypatch):
    import tempfile

    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = socket_folder()
    assert len(str(folder)) < 60
    folder.rmdir()


def test_a_lost_reader_does_not_stop_events(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        events = Events(tmp_path / "events.jsonl", pipe)
    events.send("one", value=1)
    events.send("two")
    events.close()
    lines = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(x["event"], x.get("value")) for x in lines] == [("one", 1), ("two", None)]
    assert abs(lines[0]["time"] - time.time()) < 60


def test_a_reader_that_was_stopped_holds_nothing_up_and_hears_the_end(tmp_path):
    read, write = os.pipe()
    with os.fdopen(write, "w") as pipe:
        events = Events(tmp_path / "events.jsonl", pipe)
        for number in range(2000):  # half a MiB: eight times what a pipe holds
            events.send("parts", number=number, text="x" * 200)
        events.send("stopped")
        assert last(tmp_path / "events.jsonl")["event"] == "stopped"
    heard = []
    with os.fdopen(read, "rb") as pipe, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: heard.extend(pipe))  # SIGCONT
        events.close()
    numbers = [json.loads(line).get("number") for line in heard]
    assert numbers[0] == 0
    assert numbers[-3:] == [1998, 1999, None]
    assert len(numbers) < 2001


def test_a_server_that_ends_does_not_wait_for_a_reader_that_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.serving.events.FAREWELL_S", 0.05)
    read, write = os.pipe()
    with os.fdopen(write, "w") as pipe, os.fdopen(read):
        events = Events(tmp_path / "events.jsonl", pipe)
        events.send("stopped", text="x" * 200_000)
        events.close()


@pytest.mark.parametrize("text", [None, "", '{"event": "sto', "[1]\n"])
def test_the_end_of_a_file_that_has_none_is_nothing(tmp_path, text):
    file = tmp_path / "events.jsonl"
    if text is not None:
        file.write_text(text)
    assert last(file) == {}
