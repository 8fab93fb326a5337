"""``quantize:`` smaller copies of the tuned model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from toolkit.recipe.base import Count, Fraction, Name, Section

Method = Literal["gptq", "awq", "bnb", "int8", "fp8"]


class CalibrationSection(Section):
    """Rows that a method looks at: held-back training rows in the recipe's template, mixed with general text."""

    rows: Count = 128
    """Number of calibration rows."""
    general: Fraction = 0.25
    """Share of the rows that comes from the general text that ships with the toolkit."""


class QuantizeSection(Section):
    """One quantized model."""

    method: Method
    """`gptq` and `awq` (4 bit, symmetric), `bnb` (bitsandbytes), `int8` (W8A8), `fp8` (dynamic)."""
    name: Name | None = None
    """Name in the plan; the method's name unless given."""
    of: Literal["merged", "base"] = "merged"
    """What is made smaller: `merged` is the tuned model (the base where nothing is trained); `base` is the base, and
    the trained adapter is then served on it as `tuned@NAME`."""
    bits: Literal[4, 8] | None = None
    """Bits per weight: 4 for gptq and awq unless given; bnb: 4 is NF4, 8 is LLM.int8()."""
    group_size: Literal["auto", 32, 64, 128] = "auto"
    """Weights that share one scale (gptq, awq); `auto` is the largest that divides the model's shapes."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers left at full precision."""
    calibration: CalibrationSection = CalibrationSection()
    """Rows that gptq, awq and int8 look at."""

    @property
    def label(self) -> str:
        """The name this model has in the plan, in gates and in `serve.models`."""
        return self.name or self.method

    @model_validator(mode="after")
    def _bits_fit_the_method(self) -> Self:
        allowed = {"gptq": (4, 8), "awq": (4,), "bnb": (4, 8), "int8": (8,), "fp8": (8,)}[
            self.method
        ]
        if self.bits is not None and self.bits not in allowed:
            raise ValueError(
                f"bits is {self.bits}, but {self.method} has {' or '.join(map(str, allowed))}"
            )
        return self


QuantizeList = Annotated[tuple[QuantizeSection, ...], Field()]
