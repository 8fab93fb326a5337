"""CPU time of the commands people wait for, as ratios to what they cannot avoid, side by side in one run.

``python benchmarks/startup.py`` prints a Markdown table; the figures in docs/explanation/measurements.md are its.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys

COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "import click": ("-c", "import click"),
    "import pydantic, yaml, click": ("-c", "import pydantic, yaml, click"),
    "toolkit --help": ("-m", "toolkit", "--help"),
    "toolkit validate (demo)": ("-m", "toolkit", "validate", "recipes/demo/tickets.yaml"),
    "toolkit plan (demo)": ("-m", "toolkit", "plan", "recipes/demo/tickets.yaml"),
}
ROUNDS = 9


def cpu_ms(arguments: tuple[str, ...]) -> float:
    """CPU milliseconds (user and system) of one process."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{arguments} ended with {process.returncode}")
    return (usage.ru_utime + usage.ru_stime) * 1000


def main() -> None:
    """Take turns, so that a busy moment of the machine meets every command alike."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            taken[name].append(cpu_ms(arguments))
    base = statistics.median(taken["import click"])
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {ROUNDS} rounds in turn\n")
    print("| command | CPU ms, median | least | to `import click` |\n| --- | --- | --- | --- |")
    for name, values in taken.items():
        middle = statistics.median(values)
        print(f"| `{name}` | {middle:.0f} | {min(values):.0f} | {middle / base:.2f} |")


if __name__ == "__main__":
    main()
