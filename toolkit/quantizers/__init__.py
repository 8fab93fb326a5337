"""Quantizers: one module per method, a class with one verb. Each makes a model folder that engines load natively."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from toolkit.recipe.quantize import QuantizeSection
from toolkit.registry import Registry

Advance = Callable[[int, int, str], None]
"""``advance(done, total, unit)``: moves the progress line."""


@dataclass(frozen=True)
class Job:
    """All a method may look at.

    Attributes:
        model: Folder of the full model.
        section: What the recipe asks for.
        device: ``cpu`` or ``cuda``.
        batches: Calibration rows, each ``{"input_ids": [1, N], "attention_mask": [1, N]}`` tensors; no row is padded,
            so that no statistic ever sees a padding token.
        advance: Moves the progress line.
        trust_remote_code: Run Python code that lies in ``model``.
    """

    model: Path
    section: QuantizeSection
    device: str
    batches: Sequence[Mapping[str, Any]]
    advance: Advance
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Quantized:
    """A quantized model in memory and what is true of it.

    Attributes:
        model: A ``PreTrainedModel`` whose ``save_pretrained`` writes the quantized folder.
        facts: For the manifest: ``bits``, ``group_size`` (None: one scale per row), ``symmetric``, ``format``.
        libraries: Packages whose versions the manifest states.
    """

    model: Any
    facts: Mapping[str, Any]
    libraries: tuple[str, ...]


class Quantizer(Protocol):
    """One method."""

    calibrates: ClassVar[bool]
    """Whether it looks at rows."""

    def quantize(self, job: Job) -> Quantized:
        """Load the full model and quantize it."""
        ...


QUANTIZERS = Registry(
    "quantization method",
    {
        name: f"toolkit.quantizers.{name}:{name.capitalize()}"
        for name in ("gptq", "awq", "bnb", "int8", "fp8")
    },
)
"""Quantizer classes by method."""
