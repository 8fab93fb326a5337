"""Optimizers: AdamW of PyTorch, or the 8-bit one of bitsandbytes."""

from __future__ import annotations

from typing import Any

from toolkit.errors import NotInstalledError
from toolkit.recipe.train import TrainSection


def build_optimizer(model: Any, config: TrainSection) -> Any:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over the trainable weights.

    Weight decay acts on matrices only: pulling norms and biases to zero hurts. With ``lora.plus_ratio`` (LoRA+,
    arXiv:2402.12354) B, and DoRA's lengths with it, learn so many times faster than A.

    Raises:
        NotInstalledError: ``adamw_8bit`` without bitsandbytes.
    """
    groups = _groups(model, config)
    if config.optimizer == "adamw":
        import torch

        return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    try:
        import bitsandbytes
    except ImportError as error:
        raise NotInstalledError(
            "train.optimizer is 'adamw_8bit', but bitsandbytes is not in the training environment",
            "use train.optimizer: adamw, or build the environment anew: toolkit env sync train",
        ) from error
    return bitsandbytes.optim.AdamW8bit(groups, lr=config.learning_rate)


def _groups(model: Any, config: TrainSection) -> list[dict[str, Any]]:
    """Trainable weights by what the optimizer does with them; ``rate`` multiplies the learning rate."""
    ratio = config.lora.plus_ratio or 1.0
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            decay = config.weight_decay if weight.ndim >= 2 else 0.0
            rate = ratio if "lora_B" in name or weight.ndim < 2 else 1.0
            groups.setdefault((decay, rate), []).append(weight)
    return [
        {"params": weights, "weight_decay": decay, "rate": rate, "lr": config.learning_rate * rate}
        for (decay, rate), weights in groups.items()
    ]


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Use this learning rate in the next step; with LoRA+ it is that of A."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]
