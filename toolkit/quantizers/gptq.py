"""``gptq``: rounds weights one column at a time and lets the rest make up for the error (arXiv:2210.17323)."""

from __future__ import annotations

from typing import ClassVar

from toolkit.quantizers import Job, Quantized, compressor


class Gptq:
    """4 or 8 bits, symmetric, one scale per group; columns ordered by activation without a cost when served."""

    calibrates: ClassVar[bool] = True

    def quantize(self, job: Job) -> Quantized:
        """See :class:`toolkit.quantizers.Quantizer`."""
        from llmcompressor.modifiers.gptq import GPTQModifier

        model = compressor.load_full(job)
        groups, facts = compressor.grouped_weights(model, job, job.section.bits or 4)
        modifier = GPTQModifier(
            config_groups=groups, ignore=list(job.section.ignore), actorder="static"
        )
        return compressor.run(model, [modifier], job, facts)
