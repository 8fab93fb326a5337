"""The process of one step, in the interpreter of the step's environment: ``python stages/__main__.py STEP.JSON``.

It is started by path, not by ``-m``, so that an environment needs nothing of ours installed and
sees nothing of the core's packages: the first lines make exactly this copy of ``toolkit``
importable and leave ``sys.path`` alone.

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
from typing import Any

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


def context(step: dict[str, Any]) -> StageContext:
    """Build the stage's context from a step file."""
    fd = os.environ.get("TOOLKIT_EVENTS_FD")
    return StageContext(
        inputs={
            role: Input(Path(i["path"]), Kind(i["kind"]), i["fingerprint"], i["facts"])
            for role, i in step["inputs"].items()
        },
        output=Path(step["output"]),
        state=Path(step["state"]),
        recipe_dir=Path(step["recipe_dir"]),
        device=step["device"],
        resume=step["resume"],
        probe=step.get("probe", False),
        interpreters={
            name: Interpreter(Path(i["python"]), tuple(map(Path, i["pythonpath"])), i["variables"])
            for name, i in step["interpreters"].items()
        },
        events=os.fdopen(int(fd), "w") if fd else None,
    )


def main(path: str) -> int:
    """Run the step that the file describes; return the exit code."""
    step = json.loads(Path(path).read_text())
    state = Path(step["state"])
    try:
        config = CONFIGS[step["stage"]].model_validate(step["config"])
        result = STAGES[step["stage"]]().run(config, context(step))
    except ToolkitError as error:
        report = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
        (state / "error.json").write_text(json.dumps(report))
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (
        Exception
    ) as error:  # the last line of defence: the worker shows the cause, the log holds the traceback
        report = {
            "type": type(error).__name__,
            "message": f"{type(error).__name__}: {error}",
            "hint": None,
        }
        (state / "error.json").write_text(
            json.dumps(report | {"traceback": traceback.format_exc()})
        )
        traceback.print_exc()
        return 1
    (state / "result.json").write_text(
        json.dumps({"metrics": dict(result.metrics), "facts": dict(result.facts)})
    )
    return 0


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
