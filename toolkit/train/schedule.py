"""Learning rates: a pure function of the step, so that a checkpoint needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def warmup_steps(total: int, share: float) -> int:
    """Steps of the warm-up: ``share`` of ``total`` rounded up; one step is left for the peak."""
    return min(math.ceil(total * share), total - 1)


def factor(step: int, total: int, warmup: int, schedule: Schedule) -> float:
    """Share of the peak learning rate at ``step`` (0-based) of ``total``.

    The warm-up rises linearly and never spends a step at zero; the peak is at ``step == warmup``;
    cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts) and linear would reach
    zero at ``step == total``, so the last step still learns.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    past = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * past))
    return 1 - past if schedule == "linear" else 1.0
