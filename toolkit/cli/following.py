"""Following a chain in a terminal: its jobs' lines, and a line whenever a job's state changes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.cli import render

if TYPE_CHECKING:
    from toolkit.launch.report import JobReport

LOOK_S = 0.3
ASK_S = 5.0
"""How often an engine is asked, and the keeper looked after."""


def follow(
    jobs: Path, name: str, *, quiet: bool = False, timeout_s: float | None = None
) -> list[JobReport]:
    """Show what the jobs of a chain print until all are over; their reports.

    Raises:
        TimeoutError: It is not over in time.
    """
    from toolkit.launch.folder import read
    from toolkit.launch.settle import settle

    chain = read(jobs / name / "chain.json") or {}
    view, begun = None if quiet else _View(jobs, chain), time.monotonic()
    asked = -ASK_S
    while True:
        if time.monotonic() - asked >= ASK_S or chain["backend"] == "local":
            reports, asked = _ask(jobs, chain, asked)
        over = all(one.state.ended for one in reports)
        if view:
            view.show(reports, over=over)
        if over:
            settle(jobs / name)
            return reports
        if timeout_s is not None and time.monotonic() - begun > timeout_s:
            raise TimeoutError
        time.sleep(LOOK_S)


def _ask(jobs: Path, chain: dict[str, Any], asked: float) -> tuple[list[JobReport], float]:
    """Reports of a chain; every ASK_S its keeper is looked after too. With them, when that was last."""
    from toolkit.launch import actions, keeper_process, report

    reports = actions.look(jobs, [chain])
    if time.monotonic() - asked < ASK_S:
        return reports, asked
    if report.needs_keeper(chain) and not all(one.state.ended for one in reports):
        keeper_process.ensure(jobs)
    return reports, time.monotonic()


class _View:
    """What a terminal shows of a chain."""

    def __init__(self, jobs: Path, chain: dict[str, Any]) -> None:
        from toolkit.launch.folder import JobFolder
        from toolkit.launch.logs import Reader

        self._readers = [Reader(JobFolder(jobs / chain["id"] / job)) for job in chain["jobs"]]
        self._shown: dict[str, tuple[str, str | None]] = {}

    def show(self, reports: Sequence[JobReport], *, over: bool) -> None:
        """Print new lines of the jobs, then what changed of their states."""
        for reader in self._readers:
            for line in reader.read(last=over):
                render.hint(line.text)
        _show_changes(reports, self._shown)


def _show_changes(reports: Sequence[JobReport], shown: dict[str, tuple[str, str | None]]) -> None:
    for one in reports:
        now = (one.state.value, one.reason)
        if shown.get(one.id) != now:
            shown[one.id] = now
            where = f" on {one.host}" if one.host and one.state == "running" else ""
            gpus = f", GPU {one.gpus}" if one.gpus and one.state == "running" else ""
            reason = f": {one.reason}" if one.reason else ""
            render.hint(f"[{one.step}] {one.state.value}{where}{gpus}{reason}")
