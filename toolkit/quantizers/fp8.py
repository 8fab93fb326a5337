"""``fp8``: weights and activations in 8-bit floating point (E4M3)."""

from __future__ import annotations

from typing import ClassVar

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
        return compressor.run(model, [modifier], job, compressor.EIGHT_BITS, rows=False)
