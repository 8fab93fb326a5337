"""Small folders that look like models and adapters, made by code: no torch, no big files in the repository.

The same folders are given to preflight and to the real engines, so that their verdicts can be compared.
"""

import json
import random
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 512,
}

SPACE = "base_model.model.model"
"""What PEFT puts before ``layers.0.self_attn.q_proj``."""

BLOCKS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}

Shapes = Mapping[str, tuple[int, ...]]


def safetensors(
    path: Path, shapes: Shapes, *, scale: int | None = None, dtype: str = "BF16"
) -> Path:
    """Write a valid safetensors file: zeros (a file with a hole), or random numbers below 2**-scale."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = prod(shape) * {"BF16": 2, "F32": 4, "U8": 1, "I32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        if scale is None:
            file.truncate(file.tell() + end)
        else:
            file.write(_random_bf16(end // 2, scale, seed=end))
    return path


def _random_bf16(count: int, scale: int, seed: int) -> bytes:
    """Numbers with |x| in [2**-(scale + 2), 2**-scale), either sign: sign, 8 bits exponent, 7 bits mantissa."""
    generator = random.Random(seed)
    high = bytes([(127 - scale - 1) >> 1, (127 - scale - 1) >> 1 | 0x80])
    data = bytearray(generator.randbytes(2 * count))
    data[1::2] = bytes(data[1::2]).translate(high * 128)
    return bytes(data)


def sizes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every kind of layer of a Llama."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = head * config["num_attention_heads"]
    keys = head * config.get("num_key_value_heads", config["num_attention_heads"])
    vocabulary = config["vocab_size"]
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "lm_head": (vocabulary, hidden),
        "embed_tokens": (vocabulary, hidden),
    }


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama."""
    size, hidden = sizes(config), config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": size["embed_tokens"]}
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        for block, names in BLOCKS.items():
            shapes |= {f"{start}.{block}.{name}.weight": size[name] for name in names}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{start}.{norm}.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": size["lm_head"]}


def model_folder(folder: Path, *, is_random: bool = False, **config: Any) -> Path:
    """A folder with config.json, a Llama's tensors and a chat template; ``config`` changes the Llama config."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = LLAMA | config
    (folder / "config.json").write_text(json.dumps(changed))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text("{}")
    safetensors(folder / "model.safetensors", llama_shapes(changed), scale=4 if is_random else None)
    return folder


def adapter_folder(
    folder: Path,
    hidden: int = 256,
    *,
    tensors: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A PEFT LoRA adapter with random weights; ``config`` changes adapter_config.json.

    Args:
        folder: Where.
        hidden: Width of the base it was made for.
        tensors: Changes to its tensors: see :func:`adapter_shapes`, and ``zero``, ``cut`` (bytes
            that are missing at the end), ``add`` (name -> shape), ``drop`` (part of names), and
            ``files`` (name -> JSON) for files beside them.
        config: ``r``, ``target_modules`` and so on; its tensors follow from these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    settings |= config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    changes = dict(tensors or {})
    zero, cut = changes.pop("zero", False), changes.pop("cut", 0)
    add, drop = changes.pop("add", {}), changes.pop("drop", None)
    for name, content in changes.pop("files", {}).items():
        (folder / name).write_text(json.dumps(content))
    shapes = adapter_shapes(settings, LLAMA | {"hidden_size": hidden}, **changes)
    shapes = {name: shape for name, shape in shapes.items() if drop is None or drop not in name}
    shapes |= {name: tuple(shape) for name, shape in add.items()}
    file = safetensors(folder / "adapter_model.safetensors", shapes, scale=None if zero else 0)
    if cut:
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size - cut)
    return folder


def adapter_shapes(
    settings: Mapping[str, Any],
    base: Mapping[str, Any],
    *,
    targets: list[str] | None = None,
    layers: int = 2,
    prefix: str = SPACE,
    rank: int | None = None,
    **base_changes: Any,
) -> dict[str, tuple[int, ...]]:
    """lora_A [rank, inputs] and lora_B [outputs, rank] of every target in every layer."""
    named = settings["target_modules"]
    given = named if isinstance(named, list) else ["q_proj", "v_proj"]
    size, shapes = sizes(dict(base) | base_changes), {}
    patterns = settings.get("rank_pattern") or {}
    for name in targets or given:
        outputs, inputs = size.get(name, size["q_proj"])
        r = rank or patterns.get(name, settings["r"])
        if name == "embed_tokens":
            shapes[f"{prefix}.{name}.lora_embedding_A"] = (r, outputs)
            shapes[f"{prefix}.{name}.lora_embedding_B"] = (inputs, r)
            continue
        for module in _modules(name, layers, prefix):
            shapes[f"{module}.lora_A.weight"] = (r, inputs)
            shapes[f"{module}.lora_B.weight"] = (outputs, r)
    return shapes


def _modules(name: str, layers: int, prefix: str) -> list[str]:
    if name == "lm_head":
        return [f"{prefix.removesuffix('.model')}.lm_head"]
    block = next((b for b, names in BLOCKS.items() if name in names), "self_attn")
    return [f"{prefix}.layers.{layer}.{block}.{name}" for layer in range(layers)]
