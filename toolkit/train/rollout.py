"""What writes the answers of GRPO: vLLM on a GPU where it can, else the model as it is trained."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from toolkit.errors import NotInstalledError
from toolkit.recipe.train import TrainSection
from toolkit.train.vllm_rollout import loads_adapter

FIRST, LAST = (0, 22), (0, 31)
"""Versions of vLLM that TRL 1.16 supports, from and to."""


class Rollout(NamedTuple):
    """What writes answers, and why."""

    vllm: bool
    why: str

    def __str__(self) -> str:
        return f"{'vLLM' if self.vllm else 'transformers'}: {self.why}"


def choose_rollout(config: TrainSection, device: str, installed: str | None) -> Rollout:
    """Decide for ``train.grpo.rollout``.

    Args:
        config: With ``grpo``.
        device: ``cpu`` or ``cuda``.
        installed: Version of vLLM in the training environment, if there is one.

    Raises:
        NotInstalledError: ``vllm`` is asked for and cannot be had.
    """
    wanted = config.grpo.rollout if config.grpo else "auto"
    problem = _problem(device, installed) or _unsuited(config)
    if wanted == "transformers":
        return Rollout(False, "the recipe says transformers")
    if problem is None:
        given = "loads the adapter" if loads_adapter(config) else "is sent all weights"
        return Rollout(
            True, f"vLLM {installed} beside training on the GPU {given} after every step"
        )
    if wanted == "vllm":
        raise NotInstalledError(
            f"train.grpo.rollout is 'vllm', but {problem}",
            "set train.grpo.rollout: transformers, or point the profile's train environment at a "
            "Python that has TRL and vLLM together",
        )
    return Rollout(False, f"the model itself, since {problem}")


def _problem(device: str, installed: str | None) -> str | None:
    if device != "cuda":
        return "this machine has no GPU for it"
    if installed is None:
        return "vLLM is not in the training environment"
    numbers = installed.partition("+")[0].split(".")[:2]
    if not FIRST <= tuple(int(n) for n in numbers) <= LAST:
        between = " to ".join(".".join(map(str, v)) for v in (FIRST, LAST))
        return f"TRL supports vLLM {between}, and {installed} is installed"
    return None


def _unsuited(config: TrainSection) -> str | None:
    """Why vLLM cannot be given the weights of such a training step by step."""
    if config.method == "qlora":
        return "an adapter cannot be added to weights in 4 bit without changing them"
    if getattr(config.lora, "dora", False) and config.method == "lora":
        return "DoRA scales whole weights, which is not done for every step"
    return None


def installed_vllm() -> str | None:
    """Version of vLLM in this environment."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None
