"""torchrun as it is: one clear error out of many processes, SIGTERM for all, and two nodes on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[3]
STAGE = ROOT / "toolkit" / "stages" / "__main__.py"
LAUNCHER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from toolkit.train.parallel.launch import Launch, run
for state in map(Path, sys.argv[3:]):
    print(run(Launch(2), "test", Path(sys.argv[2]), state / "step.json", state), flush=True)
"""


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    """Start launches one after the other in one process: torch is imported once."""
    program = Path(__file__).parent / "launch_program.py"

    def start(*acts: list[str]) -> tuple[subprocess.Popen, list[Path]]:
        states = []
        for each in acts:
            state = tmp_path_factory.mktemp("state")
            (state / "step.json").write_text(json.dumps({"state": str(state), "acts": each}))
            states.append(state)
        command = [sys.executable, "-c", LAUNCHER, str(ROOT), str(program), *map(str, states)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return process, states

    return start


def test_one_rank_stops_all_and_the_error_is_its_own(launcher):
    process, states = launcher(["wait", "fail"], ["wait", "kill"], ["fail", "fail"], ["", ""])
    out, log = process.communicate(timeout=180)
    assert out.split() == ["1", "1", "1", "0"], log
    failed, killed, both, fine = states
    said = [json.loads((state / "error.json").read_text()) for state in (failed, killed, both)]
    assert said[0]["message"] == "rank 1 of 2: row 7 is broken"
    assert (said[0]["type"], said[0]["hint"]) == ("DataError", "mend it")
    assert said[1]["message"].startswith("rank 1 of 2 was ended by SIGKILL")
    assert said[2]["message"] == "row 7 is broken"
    assert not (fine / "error.json").exists()
    threads = {(fine / f"started-{rank}").read_text() for rank in (0, 1)}
    own = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert threads == {own}


def test_sigterm_reaches_every_rank(launcher):
    process, (state,) = launcher(["wait", "wait"])
    end = time.monotonic() + 120
    while len(list(state.glob("started-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, log = process.communicate(timeout=60)
    assert out.split() == ["1"], log
    assert json.loads((state / "error.json").read_text())["message"] == "asked to stop"
    assert len(list(state.glob("rank-*.json"))) == 2


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def test_two_nodes_train_one_model(context, train_config, tmp_path):
    """Two launchers that know each other only by the rendezvous, each with one process."""
    ctx = context("nodes")
    step = {
        "stage": "train",
        "config": train_config(parallel="ddp", max_steps=3).model_dump(mode="json"),
        "inputs": {
            role: {"path": str(i.path), "kind": i.kind, "fingerprint": i.fingerprint, "facts": {}}
            for role, i in ctx.inputs.items()
        },
        "output": str(ctx.output),
        "state": str(ctx.state),
        "recipe_dir": str(tmp_path),
        "device": "cpu",
        "resume": True,
        "launch": {"processes": 1, "nodes": 2, "rendezvous": f"127.0.0.1:{free_port()}"},
        "fingerprint": "f" * 64,
        "interpreters": {},
    }
    (ctx.state / "step.json").write_text(json.dumps(step))
    reader, writer = os.pipe()
    nodes = []
    for node in (1, 0):  # whoever comes first, rank 0 is on node 0: it reports
        own = {"TOOLKIT_NODE": str(node), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        own |= {"TOOLKIT_EVENTS_FD": str(writer)} if node == 0 else {}
        node_process = subprocess.Popen(
            [sys.executable, str(STAGE), str(ctx.state / "step.json")],
            env=os.environ | own,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(writer,),
        )
        nodes.append(node_process)
    os.close(writer)
    logs = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(logs)
    with os.fdopen(reader) as events:
        told = [json.loads(line) for line in events]
    assert [event["step"] for event in told if event["event"] == "metrics"] == [1, 2, 3, 3]
    result = json.loads((ctx.state / "result.json").read_text())
    assert (result["facts"]["ranks"], result["facts"]["parallel"]) == (2, "ddp")
    assert (ctx.output / "adapter_model.safetensors").is_file()
