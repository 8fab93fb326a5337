"""Starting several ranks with torchrun, and one clear error out of what they leave.

The stage's process becomes the launcher: it has no model, only torchrun's agent. Every rank is the
same program again with the same step file. ``torchrun`` is run inside this process, as
``python -m torch.distributed.run`` with :func:`torchrun_arguments` would, so that this process can
pass SIGTERM on and tell what happened.

What ranks leave in the state folder: ``rank-3.json``, the error of rank 3 with the time at which it
came. What came first is the cause; peers that lost a connection to it come later. Of a rank that a
signal ended its launcher says so, for the first node may be another.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from toolkit.train.parallel import again

LINGER_S = 3.0
"""How long a failed rank waits for the errors of the others before torchrun ends them."""

RANK_OF = "TOOLKIT_LAUNCHER"
"""Environment variable of ranks: the process that started them."""

NODE = "TOOLKIT_NODE"
"""Environment variable: which of several nodes this is, from 0. Job engines set it."""

RENDEZVOUS = "TOOLKIT_RENDEZVOUS"
"""Environment variable: ``host:port`` on the first node, where the profile names none. Job engines set it."""


@dataclass(frozen=True)
class Launch:
    """How many processes train together, and where they meet."""

    processes: int = 1
    """On each node: one for every GPU."""
    nodes: int = 1
    rendezvous: str | None = None
    """``host:port`` on the first node, where several nodes meet."""

    @property
    def ranks(self) -> int:
        """Processes over all nodes."""
        return self.processes * self.nodes


def torchrun_arguments(launch: Launch, node: int, run_id: str, start: int) -> list[str]:
    """Arguments of ``python -m torch.distributed.run``, without the program.

    Several nodes meet by torchrun's static rendezvous: it puts rank 0 on node 0, whose worker takes what rank 0
    reports (c10d puts it on the node whose name comes first), and all meet at one port that is known.

    Args:
        launch: How many, and where they meet.
        node: Which node this is.
        run_id: Equal on all nodes of one run, and on no others.
        start: How often the ranks were started before; each start has a port of its own, because the store of the
            one before may still be there.
    """
    meeting = ["--standalone"]
    if launch.nodes > 1:
        host, _, port = (launch.rendezvous or os.environ.get(RENDEZVOUS, "")).rpartition(":")
        meeting = [f"--nnodes={launch.nodes}", f"--node-rank={node}", f"--rdzv-id={run_id}"]
        meeting += [f"--master-addr={host}", f"--master-port={int(port) + start}"]
    own = [f"--nproc-per-node={launch.processes}", "--max-restarts=0", "--monitor-interval=0.5"]
    return [*meeting, *own]


def rank_environ(launch: Launch, given: Mapping[str, str], cores: int) -> dict[str, str]:
    """Variables for the ranks: what the user set stays.

    On one node everything stays on loopback: a host name that does not resolve stops nothing.
    """
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // launch.processes))}
    if launch.nodes == 1:
        wanted |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    own = {RANK_OF: str(os.getpid()), "TOOLKIT_PARENT": str(os.getpid())}
    events = given.get("TOOLKIT_EVENTS_FD")
    if events:  # torchrun closes what its children would inherit; the pipe is found through us
        own["TOOLKIT_EVENTS_PATH"] = f"/proc/{os.getpid()}/fd/{events}"
    return wanted | dict(given) | own


def run(launch: Launch, run_id: str, program: Path, step_file: Path, state: Path) -> int:
    """Start the ranks, wait for them, leave one ``error.json`` if they fail; return the exit code.

    When a rank that ran out of memory asks for it, all are started again (``again.py``).
    """
    node = int(os.environ.get(NODE, "0"))
    if node == 0:
        again.forget(state)
    if launch.nodes > 1:
        _say(f"node {node} of {launch.nodes}: {launch.processes} of {launch.ranks} ranks")
    os.environ.update(rank_environ(launch, os.environ, len(os.sched_getaffinity(0))))
    signal.signal(signal.SIGTERM, _pass_on)
    _STOPPED.clear()
    start = 0
    while True:
        if node == 0:
            for old in state.glob("rank-*.json"):
                old.unlink()
        os.environ[again.STARTS] = str(start)
        given = torchrun_arguments(launch, node, run_id, start)
        died = _run_ranks([*given, str(program), str(step_file)])
        if not died:
            return 0
        wanted = again.asked(state, start)
        if wanted is None or _STOPPED:
            report = cause(errors_of(state), died, launch.ranks)
            if node == 0:
                (state / "error.json").write_text(json.dumps(report))
            for rank, number in killed(errors_of(state), died).items():
                _leave(state, rank, {"signal": number})
            _say(f"error: {report['message']}")
            return int(report["exit_code"])
        _say(wanted.says)
        start += 1


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201 - stderr is the step's log


_STOPPED: list[int] = []
"""Signals that were passed on: who was asked to stop is not started again."""


def _run_ranks(given: list[str]) -> dict[int, int]:
    """Run all ranks of this node to their end; exit codes of those that failed, by rank."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    arguments = parse_args(given)
    arguments.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # SIGTERM is ours
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException as error:
        return {0: -int(error.sigval)}
    return {}


def _pass_on(number: int, _frame: FrameType | None) -> None:
    """Give a signal to every rank; each ends its step, then all leave together."""
    _STOPPED.append(number)
    own = os.getpid()
    for task in Path(f"/proc/{own}/task").iterdir():
        for child in (task / "children").read_text().split():
            os.kill(int(child), number)


def leave_error(state: Path, rank: int, ranks: int, report: Mapping[str, Any]) -> None:
    """In a rank that fails: say why, and give the others a moment to say it too."""
    _leave(state, rank, report)
    end = time.monotonic() + LINGER_S
    while len(errors_of(state)) < ranks and time.monotonic() < end:
        time.sleep(0.05)


def _leave(state: Path, rank: int, report: Mapping[str, Any]) -> None:
    part = state / f"rank-{rank}.json.part"
    part.write_text(json.dumps({"time": time.time(), **report}))
    part.rename(state / f"rank-{rank}.json")


def errors_of(state: Path) -> dict[int, dict[str, Any]]:
    """Errors by rank."""
    found = state.glob("rank-*.json")
    return {int(p.stem.removeprefix("rank-")): json.loads(p.read_text()) for p in found}


def killed(errors: Mapping[int, Mapping[str, Any]], died: Mapping[int, int]) -> dict[int, int]:
    """Signals that ended ranks, by rank: those that left no words, and those of which another node said it."""
    here = {
        rank: -code
        for rank, code in died.items()
        if code < 0 and -code != signal.SIGTERM and rank not in errors
    }
    return here | {rank: error["signal"] for rank, error in errors.items() if "signal" in error}


def cause(
    errors: Mapping[int, Mapping[str, Any]], died: Mapping[int, int], ranks: int
) -> dict[str, Any]:
    """What stopped the run, in one error.

    A rank that a signal ended left no words: it is the cause, and the others only lost it. An error
    that all ranks share is nobody's in particular.

    Args:
        errors: What ranks said, by rank.
        died: Exit codes by rank, negative for signals; those that torchrun saw first.
        ranks: How many there were.
    """
    ended = killed(errors, died)
    if ended:
        rank, number = min(ended.items())
        name = signal.Signals(number).name
        text = f"rank {rank} of {ranks} was ended by {name}"
        if number == signal.SIGKILL:
            text += " (SIGKILL that nobody sent is the kernel out of memory)"
        return _report("StepFailedError", text, "its log is log.txt in the step's state folder")
    if not errors:
        shown = ", ".join(f"rank {rank} with {code}" for rank, code in sorted(died.items()))
        text = f"ranks ended without a word: {shown}"
        return _report("StepFailedError", text, "its log is log.txt in the step's state folder")
    rank = min(errors, key=lambda one: errors[one]["time"])
    first = dict(errors[rank])
    first.pop("time")
    if {error["message"] for error in errors.values()} != {first["message"]} or len(errors) < ranks:
        first["message"] = f"rank {rank} of {ranks}: {first['message']}"
    return first


def _report(kind: str, message: str, hint: str) -> dict[str, Any]:
    return {"type": kind, "message": message, "hint": hint, "exit_code": 1}
