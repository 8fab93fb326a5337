"""``bnb``: bitsandbytes, NF4 with double quantization (arXiv:2305.14314) or LLM.int8() (arXiv:2208.07339)."""

from __future__ import annotations

from typing import Any, ClassVar

from toolkit.quantizers import Job, Quantized


class Bnb:
    """4 bits: NF4 in blocks of 64 with quantized scales; 8 bits: outlier columns stay at full precision."""

    calibrates: ClassVar[bool] = False

    def quantize(self, job: Job) -> Quantized:
        """See :class:`toolkit.quantizers.Quantizer`."""
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        skipped: dict[str, Any] = {"llm_int8_skip_modules": list(job.section.ignore) or None}
        bits = job.section.bits or 4
        if bits == 4:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16 if job.device == "cuda" else torch.float32,
                **skipped,
            )
            facts = {
                "bits": 4,
                "group_size": 64,
                "symmetric": True,
                "data_type": "nf4",
                "double_quantization": True,
            }
        else:
            config = BitsAndBytesConfig(load_in_8bit=True, **skipped)
            facts = {"bits": 8, "group_size": None, "symmetric": True, "data_type": "int8"}
        model = AutoModelForCausalLM.from_pretrained(
            job.model,
            quantization_config=config,
            dtype="auto",
            device_map=job.device,
            local_files_only=True,
            trust_remote_code=job.trust_remote_code,
        )
        return Quantized(
            model, facts | {"format": "bitsandbytes"}, ("bitsandbytes", "transformers", "torch")
        )
