"""Following a chain in a terminal: its jobs' lines, and a line whenever a job's state changes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    from toolkit.launch import keeping, orders, report
    from toolkit.launch.folder import JobFolder, read
    from toolkit.launch.logs import Reader
    from toolkit.launch.settle import settle

    chain = read(jobs / name / "chain.json") or {}
    readers = {job: Reader(JobFolder(jobs / name / job)) for job in chain["jobs"]}
    shown: dict[str, tuple[str, str | None]] = {}
    asked, begun = 0.0, time.monotonic()
    reports: list[JobReport] = []
    while True:
        if time.monotonic() - asked > ASK_S or chain["backend"] == "local":
            reports = orders.look(jobs, [chain])
        if time.monotonic() - asked > ASK_S:
            asked = time.monotonic()
            if report.needs_keeper(chain) and not all(one.state.ended for one in reports):
                keeping.ensure(jobs)
        over = all(one.state.ended for one in reports)
        if not quiet:
            for reader in readers.values():
                for line in reader.read(last=over):
                    render.hint(line.text)
            _show_changes(reports, shown)
        if over:
            settle(jobs / name)
            return reports
        if timeout_s is not None and time.monotonic() - begun > timeout_s:
            raise TimeoutError
        time.sleep(LOOK_S)


def _show_changes(reports: Sequence[JobReport], shown: dict[str, tuple[str, str | None]]) -> None:
    for one in reports:
        now = (one.state.value, one.reason)
        if shown.get(one.id) != now:
            shown[one.id] = now
            where = f" on {one.host}" if one.host and one.state == "running" else ""
            gpus = f", GPU {one.gpus}" if one.gpus and one.state == "running" else ""
            reason = f": {one.reason}" if one.reason else ""
            render.hint(f"[{one.step}] {one.state.value}{where}{gpus}{reason}")
