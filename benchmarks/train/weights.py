"""Random weights, made where they are used: no 16 or 140 GB file is written or read.

:func:`install` puts itself in place of ``AutoModelForCausalLM.from_pretrained``, which the toolkit,
TRL, Unsloth and LLaMA-Factory all call, so that each of them goes on as with a real model.
"""

from __future__ import annotations

from typing import Any

STD = 0.02
SEED = 7


def install() -> None:
    """From now on, models come with random weights from their folder's config."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained = staticmethod(random_model)


def random_model(
    pretrained_model_name_or_path: Any,
    *_: Any,
    config: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    **_rest: Any,
) -> Any:
    """What ``from_pretrained`` returns for a folder with these weights.

    Linear layers are quantized one by one as they are made, so that a 70B shape in NF4 never takes
    more than its packed weights and one layer. What else the caller says of a download is ignored.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = pretrained_model_name_or_path
    config = config or AutoConfig.from_pretrained(folder)
    asked = next((d for d in (dtype, torch_dtype) if d not in (None, "auto")), None)
    wanted = asked or config.dtype or torch.float32
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=wanted, attn_implementation=attn_implementation or "sdpa"
        )
    quantizer = _quantizer(quantization_config)
    if quantizer:
        quantizer.preprocess_model(model, dtype=wanted, device_map=device_map)
    torch.manual_seed(SEED)
    for module in list(model.modules()):
        _fill(module, device, wanted)
    if quantizer:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    model.config._name_or_path = str(folder)
    model.eval()
    return model


def _quantizer(settings: Any) -> Any:
    from transformers.quantizers.auto import AutoHfQuantizer

    return AutoHfQuantizer.from_config(settings, pre_quantized=False) if settings else None


def _fill(module: Any, device: str, dtype: Any) -> None:
    """Give a module of the meta device its own weights and buffers."""
    import torch

    for name, weight in list(module.named_parameters(recurse=False)):
        if weight.device.type != "meta":
            continue
        four_bits = type(weight).__name__ == "Params4bit"
        shape = (module.out_features, module.in_features) if four_bits else weight.shape
        made = torch.empty(shape, dtype=dtype if four_bits else weight.dtype, device=device)
        if made.ndim > 1:
            made.normal_(std=STD)
        else:
            made.fill_(0.0 if name == "bias" else 1.0)
        if four_bits:
            new = type(weight)(made, requires_grad=False, **weight.__dict__).to(device)
        else:
            new = torch.nn.Parameter(made, requires_grad=weight.requires_grad)
        module._parameters[name] = new
    if any(b.device.type == "meta" for b in module._buffers.values() if b is not None):
        with torch.device(device):
            module._buffers.update(type(module)(config=module.config)._buffers)  # rotary tables
    for name, buffer in module._buffers.items():  # Unsloth makes its tables on the CPU
        module._buffers[name] = None if buffer is None else buffer.to(device)
