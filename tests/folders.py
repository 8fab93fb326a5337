"""Small folders that look like models and adapters to everything that reads no weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 512,
}


def safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Write a valid safetensors file of zero bf16 tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(end))
    return path


def model_folder(folder: Path, **config: Any) -> Path:
    """A folder with config.json, one tensor and a chat template; ``config`` changes the Llama config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text("{}")
    safetensors(folder / "model.safetensors", {"model.norm.weight": (8,)})
    return folder


def adapter_folder(folder: Path, hidden: int = 256, **config: Any) -> Path:
    """A PEFT LoRA adapter on ``q_proj`` of one layer; ``config`` changes adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    settings |= config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    rank = settings["r"]
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{layer}.lora_A.weight": (rank, hidden), f"{layer}.lora_B.weight": (hidden, rank)}
    safetensors(folder / "adapter_model.safetensors", shapes)
    return folder
