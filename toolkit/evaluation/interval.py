"""How sure a mean is: bootstrap intervals (Efron and Tibshirani 1993, percentile method)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def mean_interval(scores: Sequence[float]) -> Estimate:
    """Mean of scores by row."""
    return _bootstrap([(score, 1.0) for score in scores], lambda total, count: total / count)


def perplexity_interval(losses: Sequence[tuple[float, int]]) -> Estimate:
    """Perplexity over all tokens, rows resampled.

    Args:
        losses: For each row its summed negative log-likelihood (nats) and its number of tokens.
    """
    return _bootstrap(
        [(loss, float(tokens)) for loss, tokens in losses],
        lambda loss, tokens: math.exp(loss / tokens),
    )


def _bootstrap(
    rows: Sequence[tuple[float, float]], statistic: Callable[[float, float], float]
) -> Estimate:
    def of(sample: Sequence[tuple[float, float]]) -> float:
        return statistic(sum(top for top, _ in sample), sum(bottom for _, bottom in sample))

    generator = random.Random(0)  # noqa: S311 - equal rows give equal intervals
    values = sorted(of(generator.choices(rows, k=len(rows))) for _ in range(RESAMPLES))
    return Estimate(of(rows), values[int(0.025 * RESAMPLES)], values[int(0.975 * RESAMPLES) - 1])
