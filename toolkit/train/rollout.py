"""What writes the answers of GRPO: vLLM on a GPU where it can, else the model as it is trained."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

from toolkit.errors import NotInstalledError

Wanted = Literal["auto", "transformers", "vllm"]
FIRST, LAST = (0, 22), (0, 31)
"""Versions of vLLM that TRL 1.16 supports, from and to."""


class Rollout(NamedTuple):
    """What writes answers, and why."""

    vllm: bool
    why: str

    def __str__(self) -> str:
        return f"{'vLLM' if self.vllm else 'transformers'}: {self.why}"


def choose_rollout(wanted: Wanted, device: str, installed: str | None) -> Rollout:
    """Decide for ``train.grpo.rollout``.

    Args:
        wanted: As the recipe says.
        device: ``cpu`` or ``cuda``.
        installed: Version of vLLM in the training environment, if there is one.

    Raises:
        NotInstalledError: ``vllm`` is asked for and cannot be had.
    """
    problem = _problem(device, installed)
    if wanted == "transformers":
        return Rollout(False, "the recipe says transformers")
    if problem is None:
        return Rollout(True, f"vLLM {installed} beside training on the GPU")
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


def installed_vllm() -> str | None:
    """Version of vLLM in this environment."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None
