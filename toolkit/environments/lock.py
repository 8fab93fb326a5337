"""Remakes the lock files: ``make lock``, or ``python -m toolkit.environments.lock [NAME...]``.

Needs no GPU and downloads no wheel: uv reads the metadata of packages for the machine that the
source names. Versions stay as they are unless a source changed or ``--upgrade`` is given, so a
second run changes nothing. Packages that are on no index (a local build of torch for the CPU) come
from ``UV_FIND_LINKS`` or ``PIP_FIND_LINKS``; neither it nor an index is written down.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from toolkit import resources
from toolkit.environments.lockfile import directives, lock_names
from toolkit.environments.uv import torch_source, uv, uv_environ
from toolkit.errors import ToolkitError


def arguments(name: str) -> list[str]:
    """Arguments of ``uv pip compile`` for one lock, with paths relative to the checkout."""
    folder = resources.locks().relative_to(checkout())
    about = directives((checkout() / folder / f"{name}.in").read_text())
    args = [str(folder / f"{name}.in"), "--generate-hashes", "--no-header", "--quiet"]
    if "universal" in about:
        args += ["--universal", "--python-version", about["universal"]]
    else:
        args += ["--python-version", about["python"], "--python-platform", about["platform"]]
    for key in ("override", "constraint"):
        if key in about:
            args += [f"--{key}", str(folder / about[key])]
    if "sources" in about:
        file, _, extra = about["sources"].rstrip("]").partition("[")
        args += [file, *(("--extra", extra) if extra else ())]
    return args


def checkout() -> Path:
    """The root of the checkout that this package runs from."""
    root = resources.PACKAGE.parent
    if not (root / "pyproject.toml").is_file():
        raise ToolkitError("locks are made in a checkout, and this is an installed package")
    return root


def header(name: str) -> str:
    """The first lines of a lock file: who made it, and for which machine."""
    about = directives((resources.locks() / f"{name}.in").read_text())
    kept = {key: about[key] for key in ("python", "platform", "universal") if key in about}
    lines = [f"# Made by `make lock` from {name}.in; edit that and run it again."]
    return "\n".join(lines + [f"# {key}: {value}" for key, value in kept.items()]) + "\n"


def make_lock(name: str, *, upgrade: bool = False) -> bool:
    """Resolve one lock again; return whether the file changed.

    Raises:
        ToolkitError: uv found no set of versions; the message is uv's.
    """
    target = resources.locks() / f"{name}.txt"
    old = target.read_text() if target.is_file() else ""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / target.name
        output.write_text(old)  # uv keeps the versions it finds there
        command = [uv(), "pip", "compile", *arguments(name), "-o", str(output)]
        if name.endswith("-cpu"):
            command += torch_source()
        if upgrade:
            command.append("--upgrade")
        done = subprocess.run(
            command, cwd=checkout(), env=uv_environ(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ToolkitError(f"lock {name} does not resolve:\n{done.stderr.strip()}")
        new = header(name) + output.read_text()
    if new != old:
        target.write_text(new)
    return new != old


def main() -> int:
    """Remake the named locks, or all; core goes first because dev agrees with it."""
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.environments.lock", description="Remake lock files."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="locks to remake (default: all)")
    parser.add_argument(
        "--upgrade", action="store_true", help="take the newest versions that the sources allow"
    )
    given = parser.parse_args()
    for name in given.names or lock_names():
        try:
            changed = make_lock(name, upgrade=given.upgrade)
        except ToolkitError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.exit_code
        sys.stderr.write(f"{name}: {'changed' if changed else 'unchanged'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
