"""The only module that prints. Text for people goes through rich; JSON for scripts stays plain."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from toolkit.errors import ToolkitError


def say(text: str = "") -> None:
    """Print a line for people on standard output."""
    print(text, flush=True)


def hint(text: str) -> None:
    """Print a line for people on standard error, so that standard output stays for results."""
    print(text, file=sys.stderr, flush=True)


def warn(warnings: Sequence[str]) -> None:
    """Print warnings for people on standard error."""
    for text in warnings:
        hint(f"warning: {text}")


def as_json(value: Any) -> None:
    """Print one JSON value."""
    print(json.dumps(value, indent=2, default=str), flush=True)


def error(problem: ToolkitError) -> None:
    """Print an error and its hint on standard error."""
    print(f"error: {problem.message}", file=sys.stderr)
    if problem.hint:
        print(f" hint: {problem.hint}", file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """Print a table; ``None`` is an empty cell, numbers are aligned right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], int | float) or row[index] is None for row in rows)
        drawn.add_column(column, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*("" if cell is None else str(cell) for cell in row))
    width = None if sys.stdout.isatty() else 200  # a log has no edge to fold at
    Console(highlight=False, width=width).print(drawn)


def duration(seconds: float) -> str:
    """``95`` -> ``"1m35s"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class ProgressLine:
    """One line that keeps moving: rewritten on a terminal, printed every ``every_s`` seconds elsewhere (CI logs)."""

    def __init__(self, label: str, every_s: float = 10.0) -> None:
        self._label = label
        self._every_s = every_s
        self._live = sys.stderr.isatty()
        self._last = 0.0
        self._start = time.monotonic()

    def update(self, text: str, *, at_once: bool = False) -> None:
        """Show ``text`` with the time since the start; ``at_once`` also where lines are rare."""
        now = time.monotonic()
        if not at_once and now - self._last < (0.1 if self._live else self._every_s):
            return
        self._last = now
        line = self._cut(f"{self._label}  {duration(now - self._start)}  {text}")
        end = "" if self._live else "\n"
        print(f"\r\x1b[2K{line}" if self._live else line, end=end, file=sys.stderr, flush=True)

    def _cut(self, line: str) -> str:
        """What fits into the terminal's width: a line that wraps could not be rewritten."""
        return line[: shutil.get_terminal_size().columns - 1] if self._live else line

    def close(self, text: str) -> None:
        """Leave a last line."""
        line = f"{self._label}  {duration(time.monotonic() - self._start)}  {text}"
        print(f"\r\x1b[2K{line}" if self._live else line, file=sys.stderr, flush=True)


class Progress:
    """Shows the events of steps (see ``worker.Show``): one moving line for the step that runs."""

    def __init__(self) -> None:
        self._line: ProgressLine | None = None
        self._text = "starting"
        self._shown: Mapping[str, Any] = {}
        self._unit = ""

    def show(self, step: str, event: Mapping[str, Any]) -> None:
        """Take one event."""
        kind = event["event"]
        if kind in ("started", "waiting"):
            self._line = ProgressLine(f"{step:<16}")
            waiting = "another run is making this artifact: waiting for it"
            self._text = "starting" if kind == "started" else waiting
            self._shown = {}
        elif kind == "progress":
            if event["shown"] or event["unit"] != self._unit:  # else nothing new is known
                self._shown, self._unit = event["shown"], event["unit"]
            self._text = _progress_text(event, self._shown)
        elif kind == "note":
            self._text = event["text"]
        if self._line and kind == "finished":
            numbers = [f"{k} {_number(v)}" for k, v in event["metrics"].items()]
            self._line.close("done  " + "  ".join(numbers[:4]))
        elif self._line:
            self._line.update(self._text, at_once=kind == "note")


def _number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


IN_SHORT: Mapping[str, Callable[[float], str]] = {
    "eta_s": lambda v: f"ETA {duration(v)}",
    "tokens_per_second": lambda v: f"{v:,.0f} tok/s",
    "mfu_percentage": lambda v: f"MFU {v:.0f}%",
    "peak_gpu_memory_gib": lambda v: f"{v:.1f} GiB",
    "peak_memory_gib": lambda v: f"{v:.1f} GiB",
    "gpu_utilization_percentage": lambda v: f"GPU {v:.0f}%",
    "gpu_power_usage_watts": lambda v: f"{v:.0f} W",
    "learning_rate": lambda v: f"lr {v:.1e}",
    "grad_norm": lambda v: f"grad {v:.3g}",
}
"""How the progress line writes metrics, by their names in MLflow; others stand there with their names."""


def _progress_text(event: Mapping[str, Any], shown: Mapping[str, Any]) -> str:
    done, total = event["done"], event["total"]
    share = f" {100 * done / total:3.0f}%" if total else ""
    parts = [
        IN_SHORT[key](value) if key in IN_SHORT else f"{key} {_number(value)}"
        for key, value in shown.items()
    ]
    unit, scale = ("MB", 1e6) if event["unit"] == "B" else (event["unit"], 1)
    amount = f"{done / scale:.6g}/{total / scale:.6g}" if total else f"{done / scale:.0f}"
    return f"{share} {amount} {unit}  {'  '.join(parts)}".strip()
