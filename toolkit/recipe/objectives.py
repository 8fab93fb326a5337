"""``train.dpo``, ``train.kto``, ``train.orpo``, ``train.grpo``: what a run that is not SFT optimises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from toolkit.recipe.base import Count, Fraction, Section
from toolkit.recipe.paths import file_of

Objective = Literal["sft", "dpo", "kto", "orpo", "grpo"]
CONVERSATIONS = ("messages", "sharegpt", "prompt_completion", "alpaca", "text")
"""Row formats of supervised fine-tuning, in the order in which they are recognised."""
TRAINED_ON: Mapping[Objective, tuple[str, ...]] = {
    "sft": CONVERSATIONS,
    "dpo": ("preference",),
    "orpo": ("preference",),
    "kto": ("labelled",),
    "grpo": (*CONVERSATIONS[:-1], "prompt"),
}
"""Row formats that an objective trains on, in the order in which they are recognised."""
SCORED: Mapping[Objective, tuple[str, ...]] = {
    name: (*formats, *(f for f in CONVERSATIONS if f not in formats))
    for name, formats in TRAINED_ON.items()
}
"""Row formats of held-out sources: a good answer to compare with is enough there."""

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class DpoSection(Section):
    """Direct preference optimisation of pairs against the base (Rafailov et al. 2023, arXiv:2305.18290)."""

    beta: Positive = 0.1
    """How strongly the model is held to the base; with `loss: ipo` the regularisation τ."""
    loss: Literal[
        "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "apo_zero", "apo_down", "nca_pair"
    ] = "sigmoid"
    """Loss of a pair, by TRL's names; `sigmoid` is the one of the paper."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs taken to be labelled the wrong way round; only with `loss: robust`."""

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Self:
        if self.label_smoothing and self.loss != "robust":
            raise ValueError(
                f"label_smoothing is read by loss 'robust' alone, and loss is {self.loss!r}"
            )
        return self


class KtoSection(Section):
    """Answers that are each marked good or bad, without pairs (Ethayarajh et al. 2024, arXiv:2402.01306)."""

    beta: Positive = 0.1
    """How strongly the model is held to the base."""
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """Loss of an answer, by TRL's names; `kto` needs a `batch_size` of 2 or more, from which it takes its KL."""
    desirable_weight: Positive = 1.0
    """Weight of good answers; raise it where they are few."""
    undesirable_weight: Positive = 1.0
    """Weight of bad answers; raise it where they are few."""


class OrpoSection(Section):
    """Pairs without a reference model: likelihood plus odds ratio (Hong et al. 2024, arXiv:2403.07691)."""

    beta: Positive = 0.1
    """Weight of the odds ratio, λ in the paper."""


class GrpoSection(Section):
    """Answers that the model writes itself, in groups, rated by functions (Shao et al. 2024, arXiv:2402.03300)."""

    rewards: Annotated[tuple[str, ...], Field(min_length=1)]
    """Functions `file.py:function` relative to the recipe: `(prompts, completions, **columns)`, a number per answer."""
    weights: tuple[float, ...] = ()
    """Weight of each reward in the sum; without it every one counts 1."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers written to each prompt; their mean reward is what each of them is compared with."""
    max_completion_tokens: Count = 256
    """Longest answer; prompt and answer together fit into `model.max_length`."""
    temperature: Positive = 1.0
    """Sampling temperature of the answers."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that make up this probability."""
    beta: NotNegative = 0.0
    """Weight of the KL divergence from the base; at 0 the base is not computed."""
    epsilon: Fraction = 0.2
    """How far the probability ratio of a token may move before it is clipped."""
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    """How token losses are averaged, by TRL's names."""
    rollout: Literal["auto", "transformers", "vllm"] = "auto"
    """What writes the answers; `auto` is vLLM on a GPU where the training environment has one that TRL supports."""
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the GPU's memory that vLLM takes beside training."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold the rewards."""
        return tuple(dict.fromkeys(file_of(reward) for reward in self.rewards))

    @model_validator(mode="after")
    def _rewards_are_functions(self) -> Self:
        for reward in self.rewards:
            if ":" not in reward:
                raise ValueError(f"rewards names {reward!r}: write 'file.py:function'")
        if len(set(self.rewards)) < len(self.rewards):
            raise ValueError("rewards names a function twice: use weights instead")
        if self.weights and len(self.weights) != len(self.rewards):
            raise ValueError(
                f"weights has {len(self.weights)} numbers for {len(self.rewards)} rewards"
            )
        return self
