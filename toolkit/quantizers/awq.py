"""``awq``: scales channels by how strongly they are used, then rounds (arXiv:2306.00978)."""

from __future__ import annotations

from typing import ClassVar

from toolkit.quantizers import Job, Quantized, compressor


class Awq:
    """4 bits, symmetric, one scale per group."""

    calibrates: ClassVar[bool] = True

    def quantize(self, job: Job) -> Quantized:
        """See :class:`toolkit.quantizers.Quantizer`."""
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        model = compressor.load_full(job)
        groups, facts = compressor.grouped_weights(model, job, job.section.bits or 4)
        rounding = QuantizationModifier(config_groups=groups, ignore=list(job.section.ignore))
        return compressor.run(model, [AWQModifier(), rounding], job, facts)
