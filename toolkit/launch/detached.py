"""Programs of ours that outlive who starts them, and the terminal: the keeper of jobs, the driver of a sweep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def start(
    module: str, argument: Path, *, code: Path, cwd: Path, log: Path
) -> subprocess.Popen[bytes]:
    """Start ``python -m MODULE ARGUMENT`` in a session of its own.

    Args:
        module: The program.
        argument: What it is about.
        code: Folder of the package that it runs, first on its path.
        cwd: Where it starts.
        log: File that gets what it prints, behind what is there.
    """
    path = filter(None, (str(code), os.environ.get("PYTHONPATH")))
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(argument)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
