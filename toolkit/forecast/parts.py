"""What a forecast is: parts in bytes, held against a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

GIB = 2**30

CONTEXT_BYTES = 768 * 2**20
"""CUDA context and the kernels' code, outside PyTorch's allocator (measured: 0.75 GiB on an H200)."""

EXACT = 0.02
"""Share by which measured tensors differed from the forecast, at most (docs/explanation/memory-forecast.md)."""

SPARE = 0.05
"""Share that is left over before a step is said to fit: what the allocator adds is less exact."""


class Fit(StrEnum):
    """``tight`` is a forecast nearer to the limit than it is exact."""

    fits = "fits"
    tight = "tight"
    too_large = "does not fit"
    unknown = "no GPU is known"


@dataclass(frozen=True)
class Part:
    """Bytes of one purpose on one GPU."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Forecast:
    """Peak memory of a step on one GPU."""

    parts: tuple[Part, ...]
    gpu_bytes: int | None = None
    limit_bytes: int | None = None
    """What the step may take of it, where that is less than all: the engine's share."""

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(part.bytes for part in self.parts)

    @property
    def limit(self) -> int | None:
        """What there is."""
        return self.gpu_bytes if self.limit_bytes is None else self.limit_bytes

    @property
    def fit(self) -> Fit:
        """``does not fit`` only where no error of the forecast could make it fit."""
        if self.limit is None:
            return Fit.unknown
        if self.firm > self.limit:
            return Fit.too_large
        return Fit.tight if self.total * (1 + SPARE) > self.limit else Fit.fits

    @property
    def firm(self) -> int:
        """The least it can take: PyTorch gives cached blocks back before it fails."""
        loose = self.bytes_of("fragmentation")
        return int((self.total - loose) * (1 - EXACT))

    def bytes_of(self, *names: str) -> int:
        """Bytes of some parts."""
        return sum(part.bytes for part in self.parts if part.name in names)


def parts(**named: float) -> tuple[Part, ...]:
    """``parts(weights=..., lora_slots=...)``: names with spaces, whole bytes, empty ones left out."""
    return tuple(
        Part(name.replace("_", " "), round(size)) for name, size in named.items() if round(size) > 0
    )


def gib(number: float) -> str:
    """``17179869184`` -> ``"16.0"``: two digits after the point below 0.1 GiB."""
    return f"{number / GIB:.1f}" if number >= GIB / 10 else f"{number / GIB:.2f}"


def summed(found: Sequence[Part]) -> str:
    """``weights 15.0 + adapter 0.2 = 15.2 GiB``."""
    terms = " + ".join(f"{part.name} {gib(part.bytes)}" for part in found)
    return f"{terms} = {gib(sum(part.bytes for part in found))} GiB"
