"""Put the fast path into a model that PEFT has prepared."""

from __future__ import annotations

from typing import Any

import torch

from toolkit.train.speed import fp8
from toolkit.train.speed.group import Group, share_input, take_over
from toolkit.train.speed.recompute import COST, Keep, keeping

Tensor = torch.Tensor
SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children that a module of a known architecture calls with its own input."""


def _merged_base(members: list[Any], kind: str, two_copies: bool) -> tuple[Tensor, ...]:
    """The frozen tensors of the members as one; their own weights become views of it."""
    layers = [member.get_base_layer() for member in members]
    if kind == "nf4":
        return _merged_nf4(layers)
    weights = [layer.weight.data for layer in layers]
    if kind == "fp8":
        quantized = [fp8.quantize_rows(weight) for weight in weights]
        merged = torch.cat([q for q, _ in quantized])
        _point_into(layers, merged)
        scale = torch.cat([scale for _, scale in quantized])
        return (merged, scale, merged.t().contiguous()) if two_copies else (merged, scale)
    if len(weights) == 1:
        return (weights[0],)
    merged = torch.cat(weights)
    _point_into(layers, merged)
    return (merged,)


def _point_into(layers: list[Any], merged: Tensor) -> None:
    start = 0
    for layer in layers:
        rows = layer.out_features
        layer.weight = torch.nn.Parameter(merged[start : start + rows], requires_grad=False)
        start += rows


def _merged_nf4(layers: list[Any]) -> tuple[Tensor, ...]:
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
    start = 0
    for layer, part in zip(layers, packed, strict=True):
        layer.weight.data = merged[start : start + len(part)].view(layer.weight.data.shape)
        start += len(part)
    return merged, torch.cat(scales)


def accelerate(
    model: Any,
    kind: str,
    keep: list[Keep],
    *,
    two_copies: bool = True,
    merge: bool = True,
    compiled: bool = True,
    **options: Any,
) -> None:
    """Replace the decoder layers' linear layers and what they keep; compile each layer."""
    layers = model.get_base_model().model.layers
    # the first layer then compiles to the same program as the others
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    for layer, kept in zip(layers, keep, strict=True):
        for module in list(layer.modules()):
            for names in SHARED:
                members = [getattr(module, name, None) for name in names]
                if merge and all(hasattr(member, "lora_A") for member in members):
                    frozen = _merged_base(members, kind, two_copies)
                    cost = COST["mlp" if "up_proj" in names else "projection"]
                    group = Group(members, kind, frozen, cost)
                    share_input(module, names, group)
                    for member in members:
                        member.speed_done = True
        for name, module in list(layer.named_modules()):
            if hasattr(module, "lora_A") and not hasattr(module, "speed_done"):
                cost = COST["mlp" if name.rpartition(".")[2] in ("gate_proj", "up_proj") else "projection"]
                group = Group([module], kind, _merged_base([module], kind, two_copies), cost)
                take_over(module, group)
        forward = keeping(layer.forward, kept)
        if compiled:
            forward = torch.compile(forward, **options)
        layer.forward = forward
