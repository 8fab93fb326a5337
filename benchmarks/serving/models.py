"""Models for the benchmark: the shape of Llama-3.1-8B with random weights, the same packed to 4 bits, and adapters.

Good for speed, never for quality. Written as safetensors, because no engine loads adapters at run time onto dummy
weights. The 4-bit copy is rounded to nearest in groups of 128 and packed as compressed-tensors' ``pack-quantized``.

    python3 benchmarks/serving/models.py FOLDER            # base, w4a16, adapters a0 .. a8; 22 GB
    python3 benchmarks/serving/models.py FOLDER --shape tiny --device cpu
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GROUP = 128
RANK = 16
ADAPTERS = 9
"""Eight that are served, one that is swapped in."""


@dataclass(frozen=True)
class Shape:
    """What decides the size of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    def linear(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one block: name -> (out, in)."""
        kv = self.kv_heads * self.head
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def config(self) -> dict[str, Any]:
        """The ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "tiny": Shape(256, 512, 2, 4, 2, 49152),
}

Tensors = dict[str, Any]


def random_weight(shape: tuple[int, ...], device: str, scale: float = 0.02) -> Any:
    """Normal, bf16."""
    import torch

    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, scale)


def packed(weight: Any) -> Tensors:
    """Round a matrix to 4 bits in groups along its rows; the three tensors that stand for it.

    ``weight_packed`` holds eight values of a row in an int32, the first in the lowest bits, each with 8 added.
    """
    import torch

    out, width = weight.shape
    groups = weight.float().reshape(out, width // GROUP, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).clamp(min=1e-8).to(torch.bfloat16)
    values = (groups / scale.float()).round().clamp(-8, 7).to(torch.int32).reshape(out, width) + 8
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)
    words = (values.reshape(out, width // 8, 8) << shifts).sum(-1, dtype=torch.int32)
    return {
        "weight_packed": words,
        "weight_scale": scale.squeeze(-1),
        "weight_shape": torch.tensor([out, width], dtype=torch.int64),
    }


def blocks(shape: Shape, device: str) -> Iterator[tuple[Tensors, Tensors]]:
    """Shard by shard: the plain tensors, and the same with 4-bit linear layers."""
    import torch

    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        ones = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
        norms = {
            f"{prefix}.{name}.weight": ones.clone()
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        plain, small = dict(norms), dict(norms)
        for name, size in shape.linear().items():
            weight = random_weight(size, device)
            plain[f"{prefix}.{name}.weight"] = weight
            small |= {f"{prefix}.{name}.{part}": t for part, t in packed(weight).items()}
        yield plain, small
    ends = {
        "model.embed_tokens.weight": random_weight((shape.vocabulary, shape.hidden), device),
        "lm_head.weight": random_weight((shape.vocabulary, shape.hidden), device),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16, device=device),
    }
    yield ends, ends


def adapter(shape: Shape, device: str) -> Tensors:
    """Both matrices of every linear layer, none of them zero."""
    tensors = {}
    for layer in range(shape.layers):
        for name, (out, width) in shape.linear().items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = random_weight((RANK, width), device)
            tensors[f"{key}.lora_B.weight"] = random_weight((out, RANK), device)
    return tensors


def adapter_config(base: Path) -> dict[str, Any]:
    """What PEFT would write for it."""
    names = [name.rpartition(".")[2] for name in SHAPES["tiny"].linear()]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": names,
        "base_model_name_or_path": str(base),
        "inference_mode": True,
    }


def quantization_config() -> dict[str, Any]:
    """W4A16 as compressed-tensors names it."""
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
        "dynamic": False, "observer": "minmax", "actorder": None, "block_structure": None, "observer_kwargs": {},
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": group | {"input_activations": None, "output_activations": None}
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte-level tokenizer of exactly ``vocabulary`` entries, every one printable, so each token shows as text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = ["<|begin|>", "<|end|>", *letters]
    entries += [f"Ġw{number}" for number in range(vocabulary - len(entries))]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(entries)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(entries[:2])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": template})
    (folder / "chat_template.jinja").write_text(template)
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})


def write_json(file: Path, value: Any) -> None:
    """Indented."""
    file.write_text(json.dumps(value, indent=2))


def write(folder: Path, name: str, tensors: Tensors) -> int:
    """One safetensors file; its bytes of tensors."""
    from safetensors.torch import save_file

    host = {key: tensor.cpu() for key, tensor in tensors.items()}
    save_file(host, folder / name, metadata={"format": "pt"})
    return sum(tensor.numel() * tensor.element_size() for tensor in host.values())


def index(folder: Path, shards: dict[str, list[str]], total: int) -> None:
    """Which tensor is in which file."""
    where = {key: name for name, keys in shards.items() for key in keys}
    table = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", table)


def make(folder: Path, shape_name: str, device: str) -> None:
    """Everything, next to each other under ``folder``; files of an earlier, broken call are written over."""
    import torch

    shape = SHAPES[shape_name]
    torch.manual_seed(0)
    base, small = folder / "base", folder / "w4a16"
    for target, extra in ((base, {}), (small, {"quantization_config": quantization_config()})):
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "config.json", shape.config() | extra)
        write_tokenizer(target, shape.vocabulary)
    shards: dict[Path, dict[str, list[str]]] = {base: {}, small: {}}
    with ThreadPoolExecutor(4) as pool:
        written: dict[Path, list[Any]] = {base: [], small: []}
        for number, pair in enumerate(blocks(shape, device)):
            name = f"model-{number:05d}.safetensors"
            for target, tensors in zip((base, small), pair, strict=True):
                shards[target][name] = list(tensors)
                written[target].append(pool.submit(write, target, name, tensors))
        for target, futures in written.items():
            index(target, shards[target], sum(future.result() for future in futures))
        for number in range(ADAPTERS):
            place = folder / f"a{number}"
            place.mkdir(exist_ok=True)
            write_json(place / "adapter_config.json", adapter_config(base))
            write(place, "adapter_model.safetensors", adapter(shape, device))
    (folder / "complete").write_text(shape_name)


def main() -> None:
    """Make what is not there yet; print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    begin, mark = time.monotonic(), options.folder / "complete"
    if not (mark.exists() and mark.read_text() == options.shape):
        make(options.folder, options.shape, options.device)
    size = sum(file.stat().st_size for file in options.folder.rglob("*.safetensors"))
    print(json.dumps({"seconds": round(time.monotonic() - begin, 1), "bytes": size}))


if __name__ == "__main__":
    main()
