"""Jobs in a terminal: rows, one job in full, costs."""

from __future__ import annotations

import json
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.cli import render

if TYPE_CHECKING:
    from toolkit.launch.report import JobReport


def recent(reports: Iterable[JobReport]) -> list[JobReport]:
    """Those of chains that are not over, or ended within a day."""
    by: dict[str, list[JobReport]] = defaultdict(list)
    for one in reports:
        by[one.chain].append(one)
    day = time.time() - 86400
    kept = (
        some
        for some in by.values()
        if not all(one.state.ended for one in some) or max(one.ended or 0 for one in some) > day
    )
    return [one for some in kept for one in some]


def newest_first(reports: Iterable[JobReport]) -> list[JobReport]:
    """The newest chain first, the jobs of each in the order in which they run."""
    by: dict[str, list[JobReport]] = defaultdict(list)
    for one in reports:
        by[one.chain].append(one)
    return [one for some in reversed(by.values()) for one in some]


def row(one: JobReport) -> tuple[Any, ...]:
    """A job as a row of a list, with the beginning of its reason."""
    where = " ".join(filter(None, (one.host, f"GPU {one.gpus}" if one.gpus else None)))
    took = render.duration(one.seconds) if one.seconds else None
    reason = textwrap.shorten(one.reason, 120, placeholder=" …") if one.reason else None
    return one.id, one.state.value, one.attempts or None, took, where, reason


def full(one: JobReport) -> dict[str, Any]:
    """All that is known of a job, with its tries."""
    from toolkit.launch.folder import JobFolder

    attempts = JobFolder(Path(one.folder)).attempts
    told = [{"number": a.number, "started": a.started, "ended": a.ended} for a in attempts]
    return asdict(one) | {"tries": told}


def show_one(one: JobReport) -> None:
    """Say all that is known of a job."""
    render.say(f"{one.id}  {one.state.value}{f': {one.reason}' if one.reason else ''}")
    if one.hint:
        render.say(f"  hint: {one.hint}")
    engine = f"{one.engine_id} ({one.word})" if one.word else one.engine_id
    render.say(
        f"  {one.backend}: {engine or 'not handed over'}; profile {one.profile}; {one.folder}"
    )
    for row in full(one)["tries"]:
        begun, ended = row["started"] or {}, row["ended"] or {}
        gpus = f", GPU {begun['gpus']}" if begun.get("gpus") else ""
        end = f"{ended['cause']}: {ended['message'] or 'exit code 0'}" if ended else "runs"
        render.say(f"  try {row['number']} on {begun.get('host')}{gpus}: {end}")
    render.say(f"  {render.duration(one.seconds)}, {one.gpu_hours:.3f} GPU-hours")


def show_all(reports: Sequence[JobReport], *, as_json: bool) -> None:
    """Jobs as a table, or as JSON."""
    if as_json:
        render.as_json([asdict(one) for one in reports])
    else:
        columns = ("job", "state", "tries", "time", "where", "reason")
        render.table(columns, [row(one) for one in reports])


def exit_code(reports: Sequence[JobReport]) -> int:
    """0 when all succeeded; else the first one's own, where that is one for people."""
    for one in reports:
        if one.state != "succeeded":
            code = one.exit_code or 1
            return code if 0 < code < 128 else 1
    return 0


def one_line_of_json(value: dict[str, Any]) -> str:
    """A value on one line, for logs that are read as they grow."""
    return json.dumps(value, ensure_ascii=False)


def cost(recipe: str, step: str, some: Sequence[JobReport]) -> dict[str, Any]:
    """What some jobs of one step cost together."""
    return {
        "recipe": recipe,
        "step": step,
        "jobs": len(some),
        "tries": sum(one.attempts for one in some),
        "running": sum(one.state == "running" for one in some),
        "hours": sum(one.seconds for one in some) / 3600,
        "gpu_hours": sum(one.gpu_hours for one in some),
    }


def number(value: Any) -> Any:
    """A cell: fractions with three digits."""
    return f"{value:.3f}" if isinstance(value, float) else value
