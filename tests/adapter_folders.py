"""Small LoRA adapters with real bytes, and what a server needs around them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN = 8
QUERY = "model.layers.0.self_attn.q_proj"


def write_adapter(folder: Path, *, seed: int = 0, rank: int = 4, **config: Any) -> Path:
    """A PEFT folder whose weights differ by ``seed``."""
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    name = f"base_model.model.{QUERY}"
    write_tensors(
        folder / "adapter_model.safetensors",
        {f"{name}.lora_A.weight": (rank, HIDDEN), f"{name}.lora_B.weight": (HIDDEN, rank)},
        seed,
    )
    return folder


def write_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
    header, data = {}, b""
    for name, shape in shapes.items():
        size = 4
        for extent in shape:
            size *= extent
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + size],
        }
        data += bytes([seed % 256]) * size
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def write_base(folder: Path) -> Path:
    """A model folder as far as serving looks into it."""
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "vocab_size": 32}
    config |= {
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {f"{QUERY}.weight": (HIDDEN, HIDDEN), "model.embed_tokens.weight": (32, HIDDEN)}
    write_tensors(folder / "model.safetensors", shapes, 1)
    return folder
