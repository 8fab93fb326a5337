"""``python -m toolkit.serving FOLDER``: the supervisor of the server whose ``deployment.json`` lies in FOLDER.

It tells what happens as JSON lines on standard output. The end of standard input ends it, unless ``d`` (*detached*)
came first: so it never outlives a command that was killed while it started.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
from pathlib import Path

from toolkit.errors import EngineError, ToolkitError
from toolkit.serving.events import EVENTS_FILE, Events
from toolkit.serving.state import ServerSpec
from toolkit.serving.supervisor import Supervisor


def main(argv: list[str]) -> int:
    """Run the supervisor; return the exit code."""
    os.umask(0o077)  # records, logs and tables are for their owner alone
    folder = Path(argv[0])
    events = Events(folder / EVENTS_FILE, sys.stdout)
    try:
        return _supervise(folder, events)
    finally:
        events.close()


def _supervise(folder: Path, events: Events) -> int:
    try:
        spec = ServerSpec.read(folder)
        lock = _alone(folder, spec.name)
        with lock:
            supervisor = Supervisor(spec, events)
            _watch_starter(supervisor)
            supervisor.run()
    except ToolkitError as error:
        events.send(
            "error",
            kind=type(error).__name__,
            message=error.message,
            hint=error.hint,
            exit_code=error.exit_code,
        )
        return error.exit_code
    events.send("stopped")
    return 0


def _alone(folder: Path, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202 - an open file
    """Hold the server's lock; the kernel frees it however this process ends.

    Raises:
        EngineError: A server with this name runs, or starts, in this workspace.
    """
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise EngineError(
            f"a server named {name!r} runs already",
            f"stop it with `toolkit serve --stop {name}`, or name this one with --set serve.name=OTHER",
        ) from None
    return lock


def _watch_starter(supervisor: Supervisor) -> None:
    def watch() -> None:
        if os.read(0, 1) != b"d":
            supervisor.stop(drain_s=0)

    threading.Thread(target=watch, name="starter", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
