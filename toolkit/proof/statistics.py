"""Numbers on logprobs: differences, divergence, and how much of a trained change is in a served one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import exp, isfinite, isnan, log, sqrt
from typing import NamedTuple

SMALLEST = 1e-12
"""Probability that stands for none at all, so that logarithms exist."""
FLOOR = -10.0
"""Logprobs below this count as this: one in 22,000 and one in a billion are both never, and rounding is coarse."""


class Difference(NamedTuple):
    """Absolute differences of logprobs, nats."""

    mean: float
    max: float


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean and largest absolute difference of two lists of equal length, from :data:`FLOOR` up."""
    found = [abs(a - b) for a, b in zip(known(ours), known(theirs), strict=True)]
    return Difference(sum(found) / len(found), max(found)) if found else Difference(0.0, 0.0)


def divergence(
    trained: Sequence[Mapping[int, float]], served: Sequence[Mapping[int, float]]
) -> float:
    """Mean KL divergence (nats per token) of served from trained distributions, of which the top entries are known.

    Tokens that both know count alone, all others together: by the data processing inequality (Cover and Thomas,
    Elements of Information Theory, 2.8) that is a lower bound of the divergence of the whole distributions.
    """
    found = [_divergence(p, q) for p, q in zip(trained, served, strict=True)]
    return sum(found) / len(found) if found else 0.0


def _divergence(trained: Mapping[int, float], served: Mapping[int, float]) -> float:
    shared = [token for token in trained if token in served]
    p, q = [exp(trained[t]) for t in shared], [exp(served[t]) for t in shared]
    p.append(max(1 - sum(p), 0.0))
    q.append(max(1 - sum(q), 0.0))
    pairs = [(max(a, SMALLEST), max(b, SMALLEST)) for a, b in zip(p, q, strict=True)]
    return max(sum(a * log(a / b) for a, b in pairs), 0.0)


class Change(NamedTuple):
    """A served change (adapter less base) beside the trained one."""

    scale: float
    """Projection on the trained change: 1 when they are the same, 0 when the adapter does nothing."""
    residual: float
    """Root mean square of what is left when the trained change is taken away, nats."""
    trained: float
    """Root mean square of the trained change, nats."""

    @property
    def unexplained(self) -> float:
        """The residual as a share of the trained change."""
        return self.residual / max(self.trained, SMALLEST)


def change(served: Sequence[float], trained: Sequence[float]) -> Change:
    """Compare two lists of differences."""
    left = [a - b for a, b in zip(served, trained, strict=True)]
    square = sum(t * t for t in trained)
    scale = sum(a * b for a, b in zip(served, trained, strict=True)) / max(square, SMALLEST)
    return Change(scale, rms(left), rms(trained))


def rms(values: Sequence[float]) -> float:
    """Root mean square."""
    return sqrt(sum(v * v for v in values) / len(values)) if values else 0.0


def flat(rows: Iterable[Sequence[float]]) -> list[float]:
    """All values of all rows."""
    return [value for row in rows for value in row]


def known(logprobs: Sequence[float]) -> list[float]:
    """Logprobs from :data:`FLOOR` up. What is not a number is as wrong as can be: certainty of what never happens."""
    return [max(lp, FLOOR) if isfinite(lp) else 0.0 if isnan(lp) else FLOOR for lp in logprobs]
