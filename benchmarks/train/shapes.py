"""The shapes that are trained, and model folders that hold a config and a tokenizer but no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DISTINCT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    parameters: int

    def config(self) -> dict[str, Any]:
        """``config.json`` of the Llama-3.1 family with these sizes."""
        return {name: getattr(self, name) for name in DISTINCT} | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "head_dim": self.hidden_size // self.num_attention_heads,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def flop_per_token(self) -> int:
        """Work that LoRA cannot avoid: forward, and the gradient of every layer's input.

        4 FLOP per parameter: frozen weights take no gradient of their own. Attention, adapters and
        what is computed twice to save memory are not counted, so the number favours nobody.
        """
        return 4 * self.parameters


SHAPES = {
    "8b": Shape(128256, 4096, 14336, 32, 32, 8, 8_030_261_248),  # Llama-3.1-8B
    "70b": Shape(128256, 8192, 28672, 80, 64, 8, 70_553_706_496),  # Llama-3.1-70B
    "tiny": Shape(512, 64, 128, 2, 4, 2, 139_584),  # for debugging without a GPU
}


def model_folder(shape: str, under: Path) -> Path:
    """A folder with the shape's config and a small tokenizer; made once."""
    folder = under / f"model-{shape}"
    if (folder / "tokenizer.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape].config(), indent=1))
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(500)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder
