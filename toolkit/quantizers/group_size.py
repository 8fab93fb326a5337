"""How many weights share one scale: decided by the shapes, before any calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from toolkit.errors import PreflightError

SIZES = (128, 64, 32)
"""Group sizes that the engines' 4-bit kernels know, the smallest file first."""


def sizes_that_fit(input_sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Group sizes that divide every layer's input size, largest first."""
    return tuple(size for size in SIZES if all(width % size == 0 for width in input_sizes.values()))


def choose_group_size(input_sizes: Mapping[str, int], asked: int | Literal["auto"]) -> int:
    """The group size to use.

    Args:
        input_sizes: Input width of every layer that is quantized, by the layer's name.
        asked: The recipe's ``group_size``; ``auto`` takes the largest that divides all of them.

    Raises:
        PreflightError: A layer's input width is no multiple of the size; names the layer and both numbers.
    """
    fitting = sizes_that_fit(input_sizes)
    if asked == "auto":
        if fitting:
            return fitting[0]
        layer, width = _first_misfit(input_sizes, SIZES[-1])
        raise PreflightError(
            f"no group size fits: {layer} has {width} inputs, which none of {_listed(SIZES)} divides",
            f"add {layer!r} to the section's ignore list, or use method int8 or fp8, which have one scale per row",
        )
    if asked not in fitting:
        layer, width = _first_misfit(input_sizes, asked)
        raise PreflightError(
            f"group_size is {asked}, but {layer} has {width} inputs, and {width} / {asked} leaves {width % asked}",
            f"sizes that divide every layer: {_listed(fitting) or 'none'}; "
            + (
                "write group_size: auto"
                if fitting
                else f"add {layer!r} to the section's ignore list"
            ),
        )
    return asked


def _first_misfit(input_sizes: Mapping[str, int], size: int) -> tuple[str, int]:
    return next((name, width) for name, width in input_sizes.items() if width % size)


def _listed(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))
