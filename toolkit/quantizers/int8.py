"""``int8``: weights and activations in 8-bit integers (W8A8)."""

from __future__ import annotations

from typing import ClassVar

from toolkit.quantizers import Job, Quantized, compressor


class Int8:
    """One scale per output row of a weight, fitted by GPTQ; one scale per token for activations, found when served."""

    calibrates: ClassVar[bool] = True

    def quantize(self, job: Job) -> Quantized:
        """See :class:`toolkit.quantizers.Quantizer`."""
        from llmcompressor.modifiers.gptq import GPTQModifier

        model = compressor.load_full(job)
        modifier = GPTQModifier(targets="Linear", scheme="W8A8", ignore=list(job.section.ignore))
        return compressor.run(model, [modifier], job, compressor.EIGHT_BITS)
