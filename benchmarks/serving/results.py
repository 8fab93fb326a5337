"""The results file: every measurement is written the moment it is there, so that a cut-off call loses one at most."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1


class Results:
    """Measurements by name (``vllm-bf16/base-64/1``) in one JSON file.

    Args:
        file: Read if it is there; a measurement in it is not taken again.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Any] = {"schema": SCHEMA, "machines": {}, "measurements": {}}
        if file.exists():
            self.values = json.loads(file.read_text())
        machine = describe_machine()
        self._machine = next(
            (key for key, known in self.values["machines"].items() if known == machine),
            f"machine-{len(self.values['machines']) + 1}",
        )
        self.values["machines"][self._machine] = machine

    def __contains__(self, name: str) -> bool:
        return name in self.values["measurements"]

    def add(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep a measurement; what failed before in its place is forgotten."""
        part, _, rest = name.partition("/")
        for old in (rest, rest.partition("-")[0], "server" if rest == "start" else rest):
            self.values["measurements"].pop(f"{part}/{old}/failed", None)
        at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self.values["measurements"][name] = {"at": at, "machine": self._machine, **value}
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.values, indent=1))
        part.replace(self.file)

    def forget(self, part: str) -> None:
        """Drop what a part measured before, so that it is taken again."""
        kept = {
            name: value
            for name, value in self.values["measurements"].items()
            if not name.startswith(f"{part}/")
        }
        self.values["measurements"] = kept


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "gpu": said("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "cpus": os.cpu_count(),
        "cpu": _cpu_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": said("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
    }  # fmt: skip


def installed(sites: list[Path], *names: str) -> dict[str, str]:
    """Versions of packages in the folders of an engine, read from their names."""
    found = {}
    for site in sites:
        for folder in site.glob("*.dist-info"):
            name, _, version = folder.name.removesuffix(".dist-info").partition("-")
            if name.lower().replace("_", "-") in names:
                found.setdefault(name.lower(), version)
    return found


def said(*command: str) -> str | None:
    """What a short command prints; ``None`` where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str | None:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None
    )
