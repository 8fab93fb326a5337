"""LoftQ (arXiv:2310.08659): an adapter that starts as the correction of its 4-bit base.

Legend: O outputs and I inputs of a linear layer, r rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import PreflightError
from toolkit.train.start import Matrices, matrices, named, pairs, scale_of

if TYPE_CHECKING:
    import torch


def lost_by_rounding(adapted: Any, base: Path) -> Matrices:
    """LoftQ's start in one round: the best A and B of rank r for what NF4 lost of each weight.

    The base then stays the NF4 form of the original, which an engine can serve too. Unlike PEFT 0.21 the scale of
    the adapter is divided out (peft#1982), so that base and adapter together are nearest to the original; and it
    runs where the model is, not on a GPU alone.

    Args:
        adapted: A PEFT model on a base in NF4.
        base: Folder with its weights as they were before.

    Raises:
        PreflightError: The folder's files name their weights otherwise than the model does.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    settings = adapted.peft_config["default"]
    found: Matrices = {}
    originals = _Originals(base)
    for module, _a, _b in pairs(matrices(adapted)):
        packed = adapted.get_base_model().get_submodule(module).base_layer.weight
        rounded = dequantize_4bit(packed.data, packed.quant_state).to(torch.float32)  # [O, I]
        lost = originals.weight(module).to(rounded) - rounded
        found |= named(module, *low_rank(lost / scale_of(settings), settings.r))
    return found


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B [O, r] and A [r, I] whose product is nearest to a matrix [O, I]; the root of each singular value in both."""
    import torch

    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return (left[:, :rank] * roots).contiguous(), (roots[:, None] * right[:rank]).contiguous()


class _Originals:
    """Weights of the base before quantization, read one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._folder = folder
        self._files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
        self._held = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - not a dict

    def weight(self, module: str) -> torch.Tensor:
        name = f"{module}.weight"
        if name not in self._held:
            raise PreflightError(
                f"train.lora.init is 'loftq', but {self._folder} has no weight {name}: its files name "
                "weights otherwise than the model does",
                "take train.lora.init: default",
            )
        found: torch.Tensor = self._held[name].get_tensor(name)
        return found
