"""A PiSSA adapter as a plain one of the same function: for the base as it was, loadable by every engine.

Trained were A and B on W - s B0 A0. On W itself the same model is W + s (B A - B0 A0), a plain adapter of twice the
rank. The two products are large and nearly the same, so [B, -B0] and [A; A0] as they stand would lose their
difference when an engine rounds them to bf16; their singular vectors are stored instead, found in float64.

Legend: O outputs and I inputs of a linear layer, r rank, s scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.data.store import TokenRow
from toolkit.errors import StepFailedError
from toolkit.train.effect import row_logits
from toolkit.train.model import Numerics, load_base
from toolkit.train.start import FILE, Matrices, load_adapter, named, pairs, read, scale_of

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-2
"""Largest difference of a logit in float32, trained model to converted adapter on the base, after training in fp32."""

ROUNDING = 1.0
"""After training in bf16: how much of what bf16 activations do to a logit the rounding of W - s B0 A0 may do."""

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Conversion:
    """How exactly the converted adapter is the trained model."""

    error: float  # largest difference of a logit, both in float32
    tolerance: float  # what it may be
    rank: int


def convert(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    precision: Any,
    row: TokenRow,
    device: str,
    trust_remote_code: bool = False,
) -> Conversion:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` of a plain adapter, and compare.

    Args:
        base: Folder of the base model.
        adapter: What training wrote, with its start.
        output: Existing folder.
        precision: In which training computed: ``fp32`` or ``bf16``.
        row: A held-out row on which both are compared.
        device: ``cpu`` or ``cuda``; one float32 copy of the model must fit there.
        trust_remote_code: Run Python code that lies in ``base``.

    Raises:
        StepFailedError: The converted adapter on the base is not the trained model.
        ArtifactError: The start is damaged.
    """
    import torch
    from peft import PeftModel

    numerics = Numerics(precision, quantized=False)
    trained, rounding = _trained(base, adapter, numerics, row, device, trust=trust_remote_code)
    rank = _write_plain(adapter, output)
    plain = load_base(base, numerics, device, trust_remote_code=trust_remote_code)
    converted = PeftModel.from_pretrained(plain.to(torch.float32), str(output))
    error = float((trained - row_logits(converted, row)).abs().max())
    tolerance = max(TOLERANCE, ROUNDING * rounding)
    if not error <= tolerance:
        raise StepFailedError(
            f"the adapter on its base is not the trained model: a logit differs by {error:.3g}, "
            f"more than {tolerance:.3g}",
            "export it merged (export.formats: [merged], serve.models: [merged]) and report this with the recipe",
        )
    return Conversion(error, tolerance, rank)


def _trained(
    base: Path, adapter: Path, numerics: Numerics, row: TokenRow, device: str, *, trust: bool
) -> tuple[torch.Tensor, float]:
    """Logits of the trained model in float32, and how far those in training's own precision are from them."""
    import torch

    model = load_base(base, numerics, device, trust_remote_code=trust)
    adapted = load_adapter(model, adapter)
    as_trained = row_logits(adapted, row)
    exact = row_logits(adapted.to(torch.float32), row)
    return exact, float((as_trained - exact).abs().max())


def _write_plain(adapter: Path, output: Path) -> int:
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    settings = LoraConfig.from_pretrained(str(adapter))
    plain = plain_matrices(load_file(adapter / WEIGHTS), read(adapter / FILE))
    save_file(plain, output / WEIGHTS, metadata={"format": "pt"})
    rank: int = 2 * settings.r
    stored = json.loads((adapter / SETTINGS).read_text()) | {
        "r": rank,
        "lora_alpha": scale_of(settings) * rank,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    (output / SETTINGS).write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    return rank


def plain_matrices(trained: Mapping[str, torch.Tensor], start: Matrices) -> Matrices:
    """A' [2r, I] and B' [O, 2r] with B' A' = B A - B0 A0 of every layer."""
    found: Matrices = {}
    first = {module: (a0, b0) for module, a0, b0 in pairs(start)}
    for module, a, b in pairs(trained):
        a0, b0 = first[module]
        found |= named(module, *difference(b, a, b0, a0))
    return found


def difference(
    b: torch.Tensor, a: torch.Tensor, b0: torch.Tensor, a0: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """B' [O, 2r] and A' [2r, I] in float32 whose product is B A - B0 A0, each with the root of its singular values."""
    import torch

    left, upper = torch.linalg.qr(torch.cat([b, -b0], 1).double())  # [O, 2r], [2r, 2r]
    right, lower = torch.linalg.qr(torch.cat([a, a0], 0).double().T)  # [I, 2r], [2r, 2r]
    u, values, v = torch.linalg.svd(upper @ lower.T)
    roots = values.sqrt()
    b_plain = left @ (u * roots)
    a_plain = (roots[:, None] * v) @ right.T
    return b_plain.float().contiguous(), a_plain.float().contiguous()
