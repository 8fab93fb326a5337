"""The frozen weights of layers as one set of tensors; the layers' own become views of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toolkit.models.fp8 import rounded_rows
from toolkit.train.speed.ops import turned


def merged_base(members: list[Any], kind: str) -> tuple[Tensor, ...]:
    """Frozen tensors of PEFT layers with the same input, as ``linear.base_product`` reads them."""
    layers = [member.get_base_layer() for member in members]
    if kind == "nf4":
        return _merged_nf4(layers)
    if kind == "fp8":
        parts = [rounded_rows(layer.weight.data) for layer in layers]
        merged = torch.cat([weight for weight, _ in parts])
        _point_into(layers, merged)
        return merged, torch.cat([scale for _, scale in parts])
    if len(layers) == 1:
        return (layers[0].weight.data,)
    merged = torch.cat([layer.weight.data for layer in layers])
    _point_into(layers, merged)
    return (merged,)


def second_copy(group: Any, *, drop: bool) -> None:
    """Hold an FP8 base transposed as well, or no longer."""
    if group.kind == "fp8":
        group.frozen = group.frozen[:2] if drop else (*group.frozen[:2], turned(group.frozen[0]))


def _point_into(layers: list[Any], merged: Tensor) -> None:
    parts = merged.split([layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight = torch.nn.Parameter(part, requires_grad=False)


def _merged_nf4(layers: list[Any]) -> tuple[Tensor, ...]:
    """Blocks of 64 never reach over rows, so packed weights of layers are simply joined."""
    from bitsandbytes.functional import dequantize_blockwise

    packed, scales = [], []
    for layer in layers:
        state = layer.weight.quant_state
        absmax = state.absmax
        if state.nested:
            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        packed.append(layer.weight.data.view(-1, 1))
        scales.append(absmax.float())
    merged = torch.cat(packed)
    for layer, part in zip(layers, merged.split([len(p) for p in packed]), strict=True):
        layer.weight.data = part.view(layer.weight.data.shape)
    return merged, torch.cat(scales)
