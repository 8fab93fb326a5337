"""Merging an adapter into its base, in float32, into exactly the weights that training saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.data.store import TokenRow
from toolkit.errors import StepFailedError
from toolkit.models.folder import copy_companions
from toolkit.models.fp8 import round_layers
from toolkit.train.effect import row_logits
from toolkit.train.model import Numerics, Precision, load_base, torch_dtype
from toolkit.train.start import load_adapter

if TYPE_CHECKING:
    from toolkit.proof.recorder import Recorder

MERGE_TOLERANCE = 1e-2
"""Largest difference of a logit, adapter on its base to merged model, both in float32."""

SHARD = "5GB"


@dataclass(frozen=True)
class MergeReport:
    """How exactly the merged model is the trained one."""

    merge_error: float  # largest difference of a logit, both in float32
    stored_error: float  # the same after rounding to the stored dtype and reading the folder back
    stored_agreement: (
        float  # share of positions where the stored model's first choice is the trained one's
    )


def merge(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    facts: Mapping[str, Any],
    dtype: str,
    row: TokenRow,
    device: str,
    trust_remote_code: bool = False,
    recorder: Recorder | None = None,
) -> MergeReport:
    """Write the merged model into ``output``, as a self-contained folder with sharded safetensors.

    Args:
        base: Folder of the base model.
        adapter: Folder of the PEFT adapter.
        output: Where to write.
        facts: What training said of the adapter: ``trained_on`` (``nf4`` merges into the
            dequantized 4-bit base, ``fp8`` into what FP8 leaves of the weights), ``targets`` and
            ``precision``.
        dtype: ``bf16``, ``fp16`` or ``fp32``, of the stored weights.
        row: A held-out row on which adapter and merged model are compared.
        device: ``cpu`` or ``cuda``; one float32 copy of the model must fit there.
        trust_remote_code: Run Python code that lies in ``base``.
        recorder: Lets the adapter on its base (``beside``) and the stored model (``model``) score its rows.

    Raises:
        StepFailedError: The merged model is not the trained one.
    """
    import torch

    quantized, in_fp8 = facts.get("trained_on") == "nf4", facts.get("trained_on") == "fp8"
    changed = str(facts.get("init")).startswith("pissa")  # what is left of the base was rounded
    rounded = quantized or changed or in_fp8
    precision: Precision = facts.get("precision", "fp32") if rounded else "fp32"
    model = base_to_merge(base, precision, quantized, device, trust_remote_code=trust_remote_code)
    if in_fp8:
        round_layers(model.to(torch.float32), facts["targets"])
    adapted = load_adapter(model, adapter).to(torch.float32)
    trained = row_logits(adapted, row)
    if recorder:
        recorder.score("beside", adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    merge_error = float((trained - row_logits(merged, row)).abs().max())
    if not merge_error <= MERGE_TOLERANCE:
        raise StepFailedError(
            f"the merged model is not the trained one: a logit differs by {merge_error:.3g}, "
            f"more than {MERGE_TOLERANCE:g}",
            "serve the adapter unmerged (serve.models: [tuned]) and report this with the recipe",
        )
    merged.to(torch_dtype(dtype))
    merged.config.use_cache = True
    merged.save_pretrained(output, max_shard_size=SHARD)
    copy_companions(base, output)
    del model, adapted, merged
    stored = read_back(output, row, device, trust_remote_code=trust_remote_code, recorder=recorder)
    return MergeReport(
        merge_error,
        float((trained - stored).abs().max()),
        float((trained.argmax(-1) == stored.argmax(-1)).float().mean()),
    )


def base_to_merge(
    folder: Path,
    precision: Precision,
    quantized: bool,
    device: str,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """The base with the weights that training saw, in no less than training's number format.

    After QLoRA that is the 4-bit base, dequantized; it is quantized from the same number format as
    in training, because rounding to bf16 first gives other 4-bit codes.
    """
    numerics = Numerics(precision, quantized)
    model = load_base(folder, numerics, device, trust_remote_code=trust_remote_code)
    if quantized:
        model = model.dequantize()
        model._weight_conversions = []
        model.config.__dict__.pop("quantization_config", None)
    return model


def read_back(
    folder: Path,
    row: TokenRow,
    device: str,
    *,
    trust_remote_code: bool = False,
    recorder: Recorder | None = None,
) -> Any:
    """Logits of the stored model, computed in float32.

    Raises:
        StepFailedError: The folder lacks weights that the model needs.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    wrong = sorted([*loading["missing_keys"], *loading["unexpected_keys"]])
    if wrong:
        raise StepFailedError(
            f"the merged folder lacks or has unknown weights: {len(wrong)}, e.g. {wrong[0]}",
            "serve the adapter unmerged (serve.models: [tuned]) and report this with the recipe",
        )
    model.to(device)
    if recorder:
        recorder.score("model", model)
    return row_logits(model, row)
