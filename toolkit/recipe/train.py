"""``train:`` how the weights are changed."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from toolkit.recipe.base import Count, Fraction, Section


class LoraSection(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A."""

    rank: Count = 16
    """Rank r of A and B. Engines derive their slots from it."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale of the adapter; the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter, or all of them but the output head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv:2312.03732)."""


class TrainSection(Section):
    """Supervised fine-tuning: loss on assistant turns only, stop token included."""

    method: Literal["lora", "qlora", "full"] = "lora"
    """`lora` on the base as it is, `qlora` on the base in 4-bit NF4 with double quantization, `full` all weights."""
    lora: LoraSection = LoraSection()
    """The adapter, with `lora` and `qlora`."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training rows; not used when `max_steps` is given."""
    max_steps: Count | None = None
    """Optimizer steps."""
    batch_size: Count = 8
    """Sequences per forward pass on each device; a packed sequence counts as one."""
    gradient_accumulation: Count = 1
    """Forward passes per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up; cosine and linear end at zero."""
    warmup: Fraction = 0.03
    """Share of the steps that the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW (arXiv:1711.05101)."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW of PyTorch, or the 8-bit one of bitsandbytes."""
    packing: bool = True
    """Put several rows into one sequence of `model.max_length` tokens; none attends to another."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto` is bf16 on a GPU that has it and fp32 elsewhere."""
    base_precision: Literal["auto", "fp8"] = "auto"
    """The frozen base with `method: lora`: `auto` as `precision` says, `fp8` rounded as the served FP8 base is."""
    speed: Literal["auto", "plain"] = "auto"
    """`auto` compiles layers and fuses the loss where it knows the architecture; `plain` is Transformers and PEFT."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Compute activations again. `auto`: fast path: as much as memory asks; else: all on a GPU, none on a CPU."""
    log_every: Count = 1
    """Steps between two logged losses."""
    evaluate_every: Count | None = None
    """Steps between two losses on held-out rows; without it only at the end."""
    evaluate_rows: Count = 64
    """Held-out rows for that loss."""
    checkpoint_every: Count | None = 50
    """Steps between two checkpoints, from which an interrupted run goes on."""

    @model_validator(mode="after")
    def _fp8_is_a_frozen_base(self) -> Self:
        if self.base_precision == "fp8" and self.method != "lora":
            raise ValueError(
                f"base_precision fp8 is for method lora, and method is {self.method!r}"
            )
        return self
