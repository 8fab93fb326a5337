"""Load any model folder for scoring with Transformers: full, quantized, with an adapter."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

from toolkit.errors import ArtifactError


def load_model(
    folder: Path,
    device: str,
    adapter: Path | None = None,
    *,
    exact: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """A model in inference mode on ``device``.

    Weights are fp32 on a CPU (bf16 is slower there without AMX) and as stored on a GPU, or fp32 there too if it is to
    be ``exact``. Compressed-tensors weights are dequantized once at load, not in every forward pass. An adapter stays
    unmerged, as it is served.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **trust)
    if quantization_method(folder) == "compressed-tensors":
        config.quantization_config["dequantize"] = True
    dtype = torch.float32 if exact or device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, device_map=device, local_files_only=True, **trust
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()


def release(device: str) -> None:
    """Give memory of dropped models back."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def quantization_method(folder: Path) -> str | None:
    """What ``config.json`` says the weights are packed by, e.g. ``compressed-tensors``; None for a full model.

    Raises:
        ArtifactError: The folder has no ``config.json``.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ArtifactError(f"{folder} is not a model folder: it has no config.json")
    config = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    return None if config is None else str(config["quant_method"])


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, padding on the left as batched generation needs, with the stop token if need be."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, padding_side="left", local_files_only=True, trust_remote_code=trust_remote_code
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
