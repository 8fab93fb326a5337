"""What gptq, awq, int8 and fp8 share: llm-compressor's one-shot run (tried with 0.14.0.1)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.quantizers import Job, Quantized
from toolkit.quantizers.group_size import choose_group_size

LIBRARIES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


EIGHT_BITS = {
    "bits": 8,
    "activation_bits": 8,
    "group_size": None,
    "symmetric": True,
    "format": "compressed-tensors",
}
"""Facts of the methods with 8-bit weights and activations and one scale per row."""


def load_full(job: Job) -> Any:
    """Load a full model on the CPU, whence llm-compressor moves one layer at a time to the GPU.

    On a CPU the weights become fp32, several times faster there than bf16; on a GPU they keep their type.
    """
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=torch.float32 if job.device == "cpu" else "auto",
        local_files_only=True,
        trust_remote_code=job.trust_remote_code,
    )


def input_sizes(model: Any, ignore: Sequence[str]) -> dict[str, int]:
    """Input width of every linear layer that is quantized, by name."""
    from compressed_tensors.utils import match_named_modules

    return {
        name: layer.in_features
        for name, layer in match_named_modules(model, ["Linear"], list(ignore))
    }


def grouped_weights(model: Any, job: Job, bits: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scheme of symmetric integer weights that share a scale by groups: (llm-compressor's config groups, our facts).

    Raises:
        PreflightError: The recipe's group size does not divide a layer.
    """
    size = choose_group_size(input_sizes(model, job.section.ignore), job.section.group_size)
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": size,
    }
    facts = {"bits": bits, "group_size": size, "symmetric": True, "format": "compressed-tensors"}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}, facts


def run(
    model: Any, modifiers: Sequence[Any], job: Job, facts: Mapping[str, Any], *, rows: bool = True
) -> Quantized:
    """Run modifiers over a model, in place.

    Args:
        model: What :func:`load_full` gave.
        modifiers: llm-compressor modifiers, in order.
        job: Whose batches calibrate.
        facts: Go into the result.
        rows: Whether the modifiers look at rows.
    """
    import torch
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    config_dtype = _stored_dtype(job.model)
    with _layers_reported(model, job, rows), _no_pinning_without_gpu():
        oneshot(
            model=model,
            recipe=list(modifiers),
            # A loader of ready batches: llm-compressor's own would pad or cut rows to make batches of them.
            dataset=DataLoader(list(job.batches), batch_size=None) if rows else None,
        )
    # Quantized values stay exact: they are rounded again on saving, and bf16 moves them by far less than half a step.
    model.to(getattr(torch, config_dtype))
    return Quantized(model, facts, LIBRARIES)


def _stored_dtype(folder: Path) -> str:
    import json

    config = json.loads((folder / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


@contextlib.contextmanager
def _layers_reported(model: Any, job: Job, rows: bool) -> Iterator[None]:
    """Move the progress line whenever calibration enters a deeper layer."""
    layers = model.get_decoder().layers if rows else []
    deepest = -1

    def entered(index: int) -> None:
        nonlocal deepest
        if index > deepest:
            deepest = index
            job.advance(index, len(layers), "layers")

    hooks = [
        layer.register_forward_pre_hook(lambda *_, index=index: entered(index))
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if layers:
        job.advance(len(layers), len(layers), "layers")


@contextlib.contextmanager
def _no_pinning_without_gpu() -> Iterator[None]:
    """Keep AWQ alive on a CPU, where pinning its cache raises "Cannot access accelerator device"."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    original = IntermediatesCache.__dict__["_pin_intermediate"]
    IntermediatesCache._pin_intermediate = classmethod(lambda *_: None)
    try:
        yield
    finally:
        IntermediatesCache._pin_intermediate = original
