"""``fp8``: weights and activations in 8-bit floating point (E4M3)."""

from __future__ import annotations

from typing import Any, ClassVar

from toolkit.models.fp8 import rounded_rows
from toolkit.quantizers import Job, Quantized, compressor


class Fp8:
    """One scale per output row of a weight, one per token for activations, found when served: looks at no rows."""

    calibrates: ClassVar[bool] = False

    def quantize(self, job: Job) -> Quantized:
        """See :class:`toolkit.quantizers.Quantizer`."""
        from llmcompressor.modifiers.quantization import QuantizationModifier

        model = compressor.load_full(job)
        modifier = QuantizationModifier(
            targets="Linear", scheme="FP8_DYNAMIC", ignore=list(job.section.ignore)
        )
        made = compressor.run(model, [modifier], job, compressor.EIGHT_BITS, rows=False)
        _to_our_numbers(made.model)
        return made


def _to_our_numbers(model: Any) -> None:
    """Give every layer the weights and scales that ``train.base_precision: fp8`` trains on.

    Weights are stored by dividing them by their scale once more: those that are a product of an e4m3 number and that
    scale come out as that very number, whatever the division rounds to.
    """
    import torch

    for layer in model.modules():
        scale = getattr(layer, "weight_scale", None)
        if (
            scale is None or scale.dtype == torch.float16
        ):  # too coarse for scales: as the library rounds them
            continue
        weight, rows = rounded_rows(layer.weight.data)
        scale.data.copy_(rows[:, None])
        layer.weight.data = (weight.float() * rows[:, None]).to(layer.weight.dtype)
