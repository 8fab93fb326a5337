"""What is not a number is an error where it first shows, never a checkpoint or an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from toolkit.errors import StepFailedError

SHOWN = 20
"""Rows that an error names."""


def not_finite(
    what: str, value: float, when: str, rows: Sequence[int] | None, file: str = "train.jsonl"
) -> NoReturn:
    """Say which number it is, when, and in which rows of the dataset.

    Raises:
        StepFailedError: Always.
    """
    where = ""
    if rows is not None:
        numbers = [int(row) for row in rows]
        shown = ", ".join(map(str, numbers[:SHOWN]))
        more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
        where = f", in rows {shown}{more} of {file} (first is 0)"
    look = ", look at those rows," if rows is not None else ""
    raise StepFailedError(
        f"the {what} is {value} {when}{where}",
        f"lower train.learning_rate{look} or set train.precision: fp32",
    )


def insist_on_numbers(weights: Mapping[str, bool]) -> None:
    """Refuse trained weights that hold NaN or infinity.

    Args:
        weights: Whether every element is finite, by name.

    Raises:
        StepFailedError: One is not.
    """
    bad = [name for name, finite in weights.items() if not finite]
    if bad:
        raise StepFailedError(
            f"{len(bad)} of {len(weights)} trained weights hold NaN or infinity, e.g. {bad[0]}",
            "lower train.learning_rate, and look at loss and grad_norm of the last steps in metrics.jsonl",
        )
