"""Optimizers: AdamW of PyTorch, or the 8-bit one of bitsandbytes."""

from __future__ import annotations

from typing import Any

from toolkit.errors import NotInstalledError
from toolkit.recipe.train import TrainSection


def build_optimizer(model: Any, config: TrainSection) -> Any:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over the trainable weights.

    Weight decay acts on matrices only: pulling norms and biases to zero hurts.

    Raises:
        NotInstalledError: ``adamw_8bit`` without bitsandbytes.
    """
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in trainable if w.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in trainable if w.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
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


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Use this learning rate in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
