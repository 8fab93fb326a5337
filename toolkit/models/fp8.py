"""The numbers of a base in FP8 (e4m3): written once, for what is trained on it and for what is served.

Compressed-tensors' FP8-dynamic: one scale per output row of a weight. Its scales are stored in the model's own type,
bf16 as a rule, so they are rounded to that *before* weights are divided by them; the library's own division is in
bf16 on a CPU and in float32 on a GPU, which moves 3 % of the weights by one step. Here it is float32 everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0
"""The largest finite e4m3."""


def rounded_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [O, I] of any type -> e4m3 [O, I] and float32 scales [O] that bf16 holds exactly.

    A row of zeros has the scale 1.
    """
    import torch

    wide = weight.float()
    scale = (wide.abs().amax(dim=-1) / LARGEST).bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)
    return (wide / scale[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def round_layers(model: Any, targets: Iterable[str]) -> Any:
    """Leave the linear layers of a base that ``targets`` names (in full, or by their last parts) with what FP8 keeps.

    A dense stand-in for the base of a run with ``train.base_precision: fp8``, which rounds the layers with an adapter.
    """
    import torch

    wanted = tuple(targets)
    for name, layer in model.named_modules():
        named = any(name == target or name.endswith(f".{target}") for target in wanted)
        if named and isinstance(layer, torch.nn.Linear):
            stored, scale = rounded_rows(layer.weight.data)
            layer.weight.data = (stored.float() * scale[:, None]).to(layer.weight.dtype)
    return model
