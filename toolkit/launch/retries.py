"""Whether a job that ended is started again: by why it ended, and how often it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.launch.spec import JobSpec
from toolkit.launch.states import Cause

FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 300.0


def again(spec: JobSpec, ends: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it gets another try.

    An attempt that kept something new costs no try: a long training may be stopped for ever and comes nearer to its
    end each time. One that kept nothing counts.

    Args:
        spec: The job.
        ends: How its attempts ended (``ended.json``), the last one last; since the last ``toolkit jobs retry``.
    """
    if not ends or not Cause(ends[-1]["cause"]).retried:
        return False
    return len([end for end in ends if counts(end)]) <= spec.retries


def counts(end: Mapping[str, Any]) -> bool:
    """Whether an attempt's end uses up a try."""
    return not (Cause(end["cause"]).retried and end.get("kept"))


def pause_s(ends: Sequence[Mapping[str, Any]]) -> float:
    """Seconds before the next try: twice as long after each that got nowhere."""
    tries = len([end for end in ends if counts(end)])
    return 0.0 if not tries else min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (tries - 1))
