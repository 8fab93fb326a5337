"""Transformers and PEFT as their documentation shows them, in a bare loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.train import rows
from benchmarks.train.cases import Case
from benchmarks.train.clock import Clock
from benchmarks.train.shapes import SHAPES


def nf4() -> Any:
    """NF4 with double quantization."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def lora() -> Any:
    """Rank 16 on every linear layer but the head."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


def base(case: Case, folder: Path) -> Any:
    """The frozen model."""
    import torch
    from transformers import AutoModelForCausalLM

    quantized = case.settings.get("method") == "qlora"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa",
        quantization_config=nf4() if quantized else None,
    )  # fmt: skip
    model.config.use_cache = False
    return model


def measure(case: Case, batch: int, folder: Path, clock: Clock) -> None:
    """Adapters in bf16 as the base is: the faster choice, float32 ones cost a cast in each layer."""
    import torch
    from peft import get_peft_model

    model = base(case, folder)
    if case.settings["recompute"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, lora(), autocast_adapter_dtype=False)
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    clock.facts["trainable_parameters"] = sum(weight.numel() for weight in weights)
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    vocabulary = SHAPES[case.shape].vocab_size
    clock.built()
    for seed in range(clock.total):
        made = rows.full_batch(batch, case.sequence, vocabulary, seed)
        ids = torch.from_numpy(made.ids).to(model.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        value = float(loss.detach())
        float(torch.nn.utils.clip_grad_norm_(weights, 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick(made.tokens, value)
