"""The process of one step, in the interpreter of the step's environment: ``python stages/__main__.py STEP.JSON``.

It is started by path, not by ``-m``, so that an environment needs nothing of ours installed and
sees nothing of the core's packages: the first lines make exactly this copy of ``toolkit``
importable and leave ``sys.path`` alone.

A step of several ranks starts here twice: first as the launcher, which runs torchrun, then as each
rank (``train/parallel/launch.py``).

Talk with the worker: file descriptor ``TOOLKIT_EVENTS_FD`` takes events as JSON lines;
``result.json`` or ``error.json`` in the step's state folder is the last word.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import IO, Any

if "toolkit" not in sys.modules:
    _package = Path(__file__).resolve().parent.parent
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _package / "stages"]
    _spec = importlib.util.spec_from_file_location(
        "toolkit", _package / "__init__.py", submodule_search_locations=[str(_package)]
    )
    assert _spec is not None and _spec.loader is not None
    sys.modules["toolkit"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["toolkit"])

from toolkit.errors import ToolkitError
from toolkit.stages import CONFIGS, STAGES, Input, Interpreter, Kind, StageContext
from toolkit.train.parallel import again
from toolkit.train.parallel.launch import RANK_OF, Launch, leave_error, run


def context(step: dict[str, Any]) -> StageContext:
    """Build the stage's context from a step file."""
    return StageContext(
        inputs={
            role: Input(Path(i["path"]), Kind(i["kind"]), i["fingerprint"], i["facts"])
            for role, i in step["inputs"].items()
        },
        output=Path(step["output"]),
        state=Path(step["state"]),
        recipe_dir=Path(step["recipe_dir"]),
        device=step["device"],
        resume=step["resume"] or again.starts() > 0,
        probe=step.get("probe", False),
        profile_steps=_window(step.get("profile_steps")),
        interpreters={
            name: Interpreter(Path(i["python"]), tuple(map(Path, i["pythonpath"])), i["variables"])
            for name, i in step["interpreters"].items()
        },
        events=_events(),
    )


def _window(steps: list[int] | None) -> tuple[int, int] | None:
    return (steps[0], steps[1]) if steps else None


def _events() -> IO[str] | None:
    """The pipe to the worker; ranks open the launcher's."""
    path, fd = os.environ.get("TOOLKIT_EVENTS_PATH"), os.environ.get("TOOLKIT_EVENTS_FD")
    if path:
        return Path(path).open("w")
    return os.fdopen(int(fd), "w") if fd else None


def main(path: str) -> int:
    """Run the step that the file describes, or start the ranks that do; return the exit code."""
    step = json.loads(Path(path).read_text())
    launch = Launch(**step["launch"])
    if launch.ranks > 1 and RANK_OF not in os.environ:
        return run(launch, step["fingerprint"], Path(__file__), Path(path), Path(step["state"]))
    return run_stage(
        step, int(os.environ.get("RANK", "0")) if launch.ranks > 1 else 0, launch.ranks
    )


def run_stage(step: dict[str, Any], rank: int, ranks: int) -> int:
    """Run the step as one of its ranks; the first leaves the result, any leaves an error."""
    try:
        config = CONFIGS[step["stage"]].model_validate(step["config"])
        result = STAGES[step["stage"]]().run(config, context(step))
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        report = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
        return _failed(step, rank, ranks, report | {"exit_code": error.exit_code})
    except (
        Exception
    ) as error:  # the last line of defence: the worker shows the cause, the log holds the traceback
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        report = {"type": type(error).__name__, "message": text, "hint": None}
        said = {"traceback": traceback.format_exc(), "exit_code": 1}
        return _failed(step, rank, ranks, report | said)
    if rank == 0:
        (Path(step["state"]) / "result.json").write_text(
            json.dumps({"metrics": dict(result.metrics), "facts": dict(result.facts)})
        )
    return 0


def _failed(step: dict[str, Any], rank: int, ranks: int, report: dict[str, Any]) -> int:
    """Leave the error: of a step of one process for the worker, of a rank for the launcher."""
    state = Path(step["state"])
    if ranks == 1:
        (state / "error.json").write_text(json.dumps(report))
    else:
        leave_error(state, rank, ranks, report)
    return int(report["exit_code"])


def die_with_parent() -> None:
    """Have the kernel end this process when its worker dies, however it dies: nothing is left holding a GPU."""
    import ctypes
    import signal

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = os.environ.get("TOOLKIT_PARENT")
    if parent and os.getppid() != int(parent):  # it died before the kernel was told
        sys.exit(1)


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1]))
