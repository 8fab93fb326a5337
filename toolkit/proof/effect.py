"""Adapter effect: an adapter changes what its base says, beyond the engine's noise, and as it was trained to.

Three questions, each on the same stored tokens (:class:`toolkit.proof.reference.StoredRow`):

1. Does it act? Its logprobs differ from the base's by more than the engine differs from itself when the same request
   comes alone and in a batch.
2. Does it agree? Its logprobs are those of the training-side forward within the tolerance of the precision.
3. Is the *change* the trained one? Served change and trained change, each against its own base, so that what the
   precision does to both falls out. This is what sees a wrong scale or missing layers where the effect is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import ProofError
from toolkit.proof import Agreement
from toolkit.proof.adapter_files import likely_cause
from toolkit.proof.engine_calls import Scored
from toolkit.proof.live import Live
from toolkit.proof.reference import StoredRow
from toolkit.proof.statistics import (
    Change,
    Difference,
    change,
    difference,
    divergence,
    flat,
    known,
    rms,
)

NOISE_ROWS = 3
"""Rows that are asked again, alone."""
NOISE_FACTOR = 3.0
"""The effect must be more than this many times the noise ..."""
NOISE_FLOOR = 2e-4
"""... and more than this many nats per token: an engine that repeats itself to the bit has no noise."""
UNEXPLAINED = 0.08
"""Share of the trained change that may be missing from the served one, root mean square ..."""
BASE_ERRORS = 2.0
"""... unless it is less than this many times what the precision does to the base."""
NEARER = 0.5
"""A known mistake is named when served logprobs fit it within the tolerance, and so much better than the right ones."""
PARTIAL = 0.9
"""A served change smaller than this share of the trained one is called partial."""


@dataclass(frozen=True)
class Measured:
    """What the engine said of some rows, in the order of the rows.

    Attributes:
        scored: Asked all together.
        noise: Difference when some of them were asked again, alone.
    """

    scored: tuple[Scored, ...]
    noise: Difference

    @property
    def logprobs(self) -> list[float]:
        """Of all scored tokens."""
        return flat(s.logprobs for s in self.scored)


def measure(live: Live, model_ids: Sequence[str], rows: Sequence[StoredRow]) -> list[Measured]:
    """Ask every model for every row in one batch, and for the first rows again one by one.

    Raises:
        EngineError: The engine does not answer.
    """
    asked = [(m, row.ids, row.places) for m in model_ids for row in rows]
    together = live.score_together(asked)
    found = []
    for n, model_id in enumerate(model_ids):
        scored = tuple(together[n * len(rows) : (n + 1) * len(rows)])
        alone = [live.score(model_id, r.ids, r.places).logprobs for r in rows[:NOISE_ROWS]]
        again = flat(s.logprobs for s in scored[:NOISE_ROWS])
        found.append(Measured(scored, difference(again, flat(alone))))
    return found


def require_stable(name: str, noise: Difference, tolerance: float) -> None:
    """Raise :class:`ProofError` when an answer depends on what else the engine is asked at the same time.

    vLLM 0.32 on a CPU gave the base's requests the adapter of another request in the same batch.
    """
    if noise.mean <= tolerance:
        return
    raise ProofError(
        f"{name}: its logprobs alone and in one batch with others differ by {noise.mean:.3f} nats per token "
        f"(largest {noise.max:.2f}), and its precision explains {tolerance:g}: requests disturb each other",
        "serve one model per engine, or another version of the engine",
    )


def agreement(
    measured: Measured, rows: Sequence[StoredRow], tolerance: float, precision: str
) -> Agreement:
    """Served logprobs beside those of the training side."""
    found = difference(measured.logprobs, flat(row.logprobs for row in rows))
    trained_top = [place for row in rows for place in row.top]
    served_top = [place for scored in measured.scored for place in scored.top]
    return Agreement(
        mean=round(found.mean, 5),
        max=round(found.max, 4),
        kl=round(divergence(trained_top, served_top), 6),
        tokens=len(measured.logprobs),
        tolerance=tolerance,
        precision=precision,
    )


def agreement_with_full(
    measured: Measured, rows: Sequence[StoredRow], tolerance: float, precision: str
) -> Agreement | None:
    """Served logprobs beside those of what the model was made from; None where that is not stored."""
    beside = tuple(
        StoredRow(r.name, r.ids, r.start, r.beside, r.beside_top)
        for r in rows
        if r.beside is not None and r.beside_top is not None
    )
    return agreement(measured, beside, tolerance, precision) if len(beside) == len(rows) else None


def require_agreement(name: str, found: Agreement, cause: str | None = None) -> None:
    """Raise :class:`ProofError` when a served model is further from the training side than its precision explains."""
    if found.mean <= found.tolerance:
        return
    raise ProofError(
        f"{name}: served logprobs differ from the training side by {found.mean:.3f} nats per token "
        f"(largest {found.max:.2f}, KL {found.kl:.3f}), and {found.precision} explains {found.tolerance:g}"
        + (f"; likely cause: {cause}" if cause else ""),
        "serve the folder that the export stage wrote; widen serve.proof.tolerance only when you know why",
    )


def require_effect(
    name: str, effect: Difference, noise: Difference, folder: Path, base: Path
) -> None:
    """Raise :class:`ProofError` when an adapter changes nothing beyond the engine's noise."""
    if effect.mean > max(NOISE_FACTOR * noise.mean, NOISE_FLOOR):
        return
    cause = likely_cause(folder, base) or (
        "the engine loaded none of its weights, although the files look right: it may know the layers by other names"
    )
    raise ProofError(
        f"{name}: the served adapter answers as its base does: logprobs differ by {effect.mean:.2g} nats per token, "
        f"and the engine's own noise is {noise.mean:.2g}; likely cause: {cause}",
        "train or export the adapter again, or serve the merged model (serve.models: [merged])",
    )


def trained_change(
    base: Measured, adapter: Measured, rows: Sequence[StoredRow]
) -> tuple[Change, float]:
    """The served change beside the trained one, and the error (root mean square) of the served base."""
    beside = flat(row.beside or () for row in rows)
    trained = _less(flat(row.logprobs for row in rows), beside)
    served = _less(adapter.logprobs, base.logprobs)
    return change(served, trained), rms(_less(base.logprobs, beside))


def _less(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(known(ours), known(theirs), strict=True)]


def is_trained_change(seen: Change, base_error: float) -> bool:
    """Whether the served change is the trained one, as far as the precision lets one see."""
    return seen.residual <= max(UNEXPLAINED * seen.trained, BASE_ERRORS * base_error)


def wrong_change(name: str, seen: Change, cause: str) -> ProofError:
    """The error for a served change that is not the trained one."""
    return ProofError(
        f"{name}: what the adapter changes is not what it was trained to: {seen.unexplained:.0%} of the trained change "
        f"({seen.trained:.2f} nats) is missing or wrong, and its size is {seen.scale:.2f} of the trained one; "
        f"likely cause: {cause}",
        "serve the merged model (serve.models: [merged]), or an engine and version that load this adapter whole",
    )


def change_cause(
    served: Sequence[float],
    rows: Sequence[StoredRow],
    seen: Change,
    tolerance: float,
    in_files: str | None,
) -> str:
    """The known mistake that fits what is served, else what the files say, else only what can be told.

    Args:
        served: The adapter's served logprobs.
        rows: What they are held against.
        seen: The change that was found.
        tolerance: How near served logprobs must be to a mistake to be called by its name, nats per token.
        in_files: See :func:`toolkit.proof.adapter_files.likely_cause`.
    """
    right = difference(served, flat(row.logprobs for row in rows)).mean
    mistakes = {
        fault: difference(served, flat(row.faults[fault] for row in rows)).mean
        for fault in (rows[0].faults if rows else ())
    }
    nearest = min(mistakes, key=mistakes.__getitem__, default=None)
    if nearest is not None and mistakes[nearest] <= min(tolerance, NEARER * right):
        return (
            f"{nearest}: served logprobs are {mistakes[nearest]:.3f} from that mistake made on purpose, "
            f"and {right:.3f} from the adapter as trained"
        )
    if in_files:
        return in_files
    if seen.scale < PARTIAL:
        return "part of the adapter is not applied (a smaller scale, or layers that the engine left out)"
    return "other weights than those that were trained, or another base"
