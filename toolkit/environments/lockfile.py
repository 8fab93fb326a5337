"""Lock files: requirements with hashes, one per environment and accelerator, under ``locks/``.

``NAME.in`` says what is wanted, ``NAME.txt`` is what was resolved. Comments of the form ``# key:
value`` at their top say for which machine::

    # python: 3.11                       version of the environment's interpreter
    # platform: x86_64-manylinux_2_28    oldest platform that must be able to install it
    # universal: 3.11                    instead of both: any platform, this Python or newer
    # override: override-cpu.txt         what replaces the requirements of packages
    # constraint: core.txt               versions to agree with
    # sources: pyproject.toml[dev]       a pyproject whose dependencies are wanted too, with its
    extra

Only the standard library is imported here: ``toolkit plan`` reads digests.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from toolkit import resources
from toolkit.errors import UsageError
from toolkit.registry import close_match

DIGEST_SHOWN = 12
"""Hex digits of a lock's digest that name a folder."""

_DIRECTIVE = re.compile(r"# (python|platform|universal|override|constraint|sources): (\S+)$")
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)


def directives(text: str) -> dict[str, str]:
    """The ``# key: value`` comments at the top of a lock file or its source."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if match := _DIRECTIVE.match(line):
            found[match[1]] = match[2]
    return found


@dataclass(frozen=True)
class Lock:
    """One lock file."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        """The file's content."""
        return self.path.read_text()

    @property
    def digest(self) -> str:
        """SHA-256 of the file, hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def python(self) -> str:
        """Version of the interpreter, such as ``3.11``."""
        about = directives(self.text)
        return about.get("python") or about["universal"]

    @property
    def accelerator(self) -> str:
        """``cpu`` or ``cuda``; empty where it does not matter."""
        tail = self.name.rpartition("-")[2]
        return tail if tail in ("cpu", "cuda") else ""

    @property
    def pins(self) -> dict[str, str]:
        """Version by distribution name."""
        return dict(_PINNED.findall(self.text))


def lock_names() -> tuple[str, ...]:
    """Names of all locks that ship."""
    return tuple(sorted(path.stem for path in resources.locks().glob("*.in")))


def load_lock(name: str) -> Lock:
    """The lock of that name.

    Raises:
        UsageError: There is none.
    """
    known = lock_names()
    if name not in known:
        raise UsageError(
            f"no lock is named {name!r}{close_match(name, known)}", f"known: {', '.join(known)}"
        )
    return Lock(name, resources.locks() / f"{name}.txt")
