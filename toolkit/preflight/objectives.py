"""What other objectives than supervised fine-tuning need of a machine."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.preflight.facts import Facts
from toolkit.preflight.verdict import Finding, refuse, rule
from toolkit.recipe import Recipe


@rule(
    "train.rollout",
    "vLLM writes answers beside training on a GPU alone",
    "TRL 1.16.0, generation/vllm_generation.py: colocate mode",
    "set train.grpo.rollout to auto or transformers, or run on a GPU",
)
def rollout(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """``train.grpo.rollout: vllm``."""
    grpo = recipe.train.grpo if recipe.train else None
    if grpo and grpo.rollout == "vllm" and facts.accelerator == "cpu":
        yield refuse(
            "train.grpo.rollout is 'vllm', and this is planned for a CPU",
            "set train.grpo.rollout: auto, or choose a profile with a GPU",
        )


RULES = (rollout,)
