"""``train:`` how the weights are changed."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from toolkit.recipe.base import Count, Fraction, Section
from toolkit.recipe.objectives import DpoSection, GrpoSection, KtoSection, Objective, OrpoSection
from toolkit.registry import close_match

INITS = ("default", "pissa", "pissa_niter_16", "loftq")
PATTERN = "default|pissa(_niter_[1-9][0-9]*)?|loftq"


def _init(value: str) -> str:
    """``value`` where PEFT knows it and the toolkit can serve what it makes; raises ValueError where not."""
    if not re.fullmatch(PATTERN, value):
        raise ValueError(
            f"init is {value!r}: write default, pissa, pissa_niter_N (such as pissa_niter_16) or "
            f"loftq{close_match(value, list(INITS))}"
        )
    return value


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
    dora: bool = False
    """DoRA (arXiv:2402.09353): learn the length of each weight's rows apart from their direction. No engine loads such
    an adapter: it is served merged."""
    init: Annotated[
        str, AfterValidator(_init), Field(json_schema_extra={"pattern": f"^({PATTERN})$"})
    ] = "default"
    """How A and B start. `default`: B is zero. `pissa` (arXiv:2404.02948): the largest singular vectors of each weight,
    which is left with the rest; `pissa_niter_16` finds them sooner, by 16 power iterations. `loftq`
    (arXiv:2310.08659): what 4-bit rounding lost; with `qlora` alone."""
    plus_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+ (arXiv:2402.12354): learning rate of B over that of A; 16 is a start, with half of `learning_rate`."""

    @property
    def is_pissa(self) -> bool:
        """Whether the base that is trained on is what PiSSA left of it."""
        return self.init.startswith("pissa")

    @property
    def served_rank(self) -> int:
        """Rank of the adapter that leaves training: PiSSA's start is subtracted by as many columns again."""
        return 2 * self.rank if self.is_pissa else self.rank

    @model_validator(mode="after")
    def _start_fits(self) -> Self:
        if self.dora and self.init != "default":
            raise ValueError(
                f"dora is true and init is {self.init!r}: DoRA measures the base's rows, which such a start moves; "
                "take dora: false, or init: default"
            )
        if self.is_pissa and self.dropout > 0:
            raise ValueError(
                f"init is {self.init!r} and dropout is {self.dropout:g}: the adapter holds the base's largest "
                "directions, which dropout would drop; take dropout: 0, or init: default"
            )
        return self


class TrainSection(Section):
    """Supervised fine-tuning (loss on assistant turns only, stop token included), or another objective."""

    objective: Objective = "sft"
    """What is learned: answers (`sft`), better over worse ones (`dpo`, `orpo`), answers marked good or bad (`kto`),
    or what reward functions like (`grpo`)."""
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
    """Forward passes of each device per optimizer step: a step sees `batch_size` times this times the devices."""
    parallel: Literal["auto", "ddp", "zero2", "zero3", "fsdp"] = "auto"
    """On several GPUs: `ddp` copies the model, `zero2` shares out optimizer state, `zero3` and `fsdp` weights too."""
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
    """Put several rows into one sequence of `model.max_length` tokens; none attends to another. Read by `sft` alone."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto` is bf16 on a GPU that has it and fp32 elsewhere."""
    base_precision: Literal["auto", "fp8"] = "auto"
    """The frozen base with `method: lora`: `auto` as `precision` says, `fp8` rounded as the served FP8 base is."""
    speed: Literal["auto", "plain"] = "auto"
    """`auto` compiles layers and fuses the loss where it knows the architecture; `plain` is Transformers and PEFT."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Compute activations again. `auto`: fast path: as much as memory asks; else: all on a GPU, none on a CPU."""
    on_oom: Literal["stop", "halve_batch"] = "stop"
    """When GPU memory runs out: `stop` and say what took it, or (`sft`) repeat the step with half the micro-batch."""
    log_every: Count = 1
    """Steps between two logged losses."""
    evaluate_every: Count | None = None
    """Steps between two losses on held-out rows; without it only at the end."""
    evaluate_rows: Count = 64
    """Held-out rows for that loss."""
    checkpoint_every: Count | None = 50
    """Steps between two checkpoints, from which an interrupted run goes on."""
    dpo: DpoSection | None = None
    """Settings of `objective: dpo`; without it their defaults."""
    kto: KtoSection | None = None
    """Settings of `objective: kto`; without it their defaults."""
    orpo: OrpoSection | None = None
    """Settings of `objective: orpo`; without it their defaults."""
    grpo: GrpoSection | None = None
    """Settings of `objective: grpo`, which needs at least `rewards`."""

    @model_validator(mode="after")
    def _sections_are_of_the_objective(self) -> Self:
        for name in ("dpo", "kto", "orpo", "grpo"):
            if getattr(self, name) is not None and name != self.objective:
                raise ValueError(f"{name} is set, but objective is {self.objective!r}")
        return self

    @model_validator(mode="after")
    def _batches_fit_the_objective(self) -> Self:
        kto = self.kto or KtoSection()
        if self.objective == "kto" and kto.loss == "kto" and self.batch_size < 2:
            raise ValueError(
                "kto takes its KL from other rows of the batch: batch_size is at least 2"
            )
        if self.objective != "grpo":
            return self
        if self.grpo is None:
            raise ValueError("objective 'grpo' needs grpo.rewards: at least one 'file.py:function'")
        answers, group = self.batch_size * self.gradient_accumulation, self.grpo.group_size
        if answers % group:
            raise ValueError(
                f"a step has batch_size x gradient_accumulation = {answers} answers, "
                f"which grpo.group_size {group} does not divide"
            )
        return self

    @model_validator(mode="after")
    def _halving_is_ours(self) -> Self:
        if self.on_oom == "halve_batch" and self.objective != "sft":
            raise ValueError(
                f"on_oom halve_batch is for objective sft, and objective is {self.objective!r}: its loss depends on "
                "which rows share a pass; take a smaller batch_size and more gradient_accumulation"
            )
        return self

    @model_validator(mode="after")
    def _fp8_is_a_frozen_base(self) -> Self:
        if self.base_precision == "fp8" and self.method != "lora":
            raise ValueError(
                f"base_precision fp8 is for method lora, and method is {self.method!r}"
            )
        if self.base_precision == "fp8" and self.lora.dora:
            raise ValueError(
                "base_precision is 'fp8', but lora.dora is true: DoRA scales whole rows of weights that are FP8 codes "
                "there; take dora: false, or base_precision: auto"
            )
        if self.base_precision == "fp8" and self.lora.is_pissa:
            raise ValueError(
                f"base_precision is 'fp8', but lora.init is {self.lora.init!r}: what PiSSA leaves of the base is not "
                "what is served in FP8; take lora.init: default"
            )
        return self

    @property
    def needs_merge(self) -> bool:
        """Whether the adapter by itself is nothing to serve on the base.

        So with DoRA, which no engine loads, and with LoftQ, whose adapter holds a correction of the 4-bit base.
        """
        return self.method != "full" and (self.lora.dora or self.lora.init == "loftq")

    @model_validator(mode="after")
    def _lora_fits_the_method(self) -> Self:
        lora, method = self.lora, self.method
        asked = {
            "dora is true": lora.dora,
            f"init is {lora.init!r}": lora.init != "default",
            f"plus_ratio is {lora.plus_ratio}": lora.plus_ratio is not None,
        }
        for words in (words for words, is_set in asked.items() if is_set and method == "full"):
            raise ValueError(
                f"lora.{words}, but method is 'full', which trains no adapter: remove it, or take "
                "method: lora"
            )
        if lora.init == "loftq" and method != "qlora":
            raise ValueError(
                f"lora.init is 'loftq', but method is {method!r}: LoftQ makes good what 4-bit rounding lost; take "
                "method: qlora, or lora.init: pissa"
            )
        if lora.init != "default" and self.parallel in ("zero3", "fsdp"):
            raise ValueError(
                f"lora.init is {lora.init!r}, but parallel is {self.parallel!r}: how the adapter starts is made "
                "from whole weights; take parallel: ddp or zero2, or lora.init: default"
            )
        if lora.is_pissa and method == "qlora":
            raise ValueError(
                f"lora.init is {lora.init!r}, but method is 'qlora': PiSSA changes weights that are 4-bit codes there; "
                "take lora.init: loftq, or method: lora"
            )
        return self
