"""Makes adapters with PEFT itself on a small base, so that the fixtures are what PEFT really writes.

Run by an interpreter with torch, transformers and peft: ``python make_peft.py BASE OUT``.
"""

import sys
from pathlib import Path

QV = ["q_proj", "v_proj"]

KINDS = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "lora-bias": {"lora_bias": True},
    "rank-pattern": {"rank_pattern": {"q_proj": 16}},
    "alpha-pattern": {"alpha_pattern": {"q_proj": 64}},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-embeddings": {"modules_to_save": ["embed_tokens"]},
    "on-head": {"target_modules": [*QV, "lm_head"]},
    "on-embeddings": {"target_modules": [*QV, "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "regex": {"target_modules": ".*[qv]_proj"},
    "one-layer": {"layers_to_transform": [0]},
    "untrained": {},
}
"""Folder -> arguments of LoraConfig."""


def main(base: str, out: str) -> None:
    """One folder for each kind, with random weights as training would leave them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for name, changes in KINDS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(
            **{"r": 8, "lora_alpha": 16, "target_modules": QV, "task_type": "CAUSAL_LM"} | changes
        )
        adapted = get_peft_model(model, config)
        if name != "untrained":
            with torch.no_grad():
                for key, weight in adapted.named_parameters():
                    if weight.requires_grad and "magnitude" not in key:
                        weight.add_(torch.randn_like(weight) * 0.2)
        adapted.save_pretrained(str(Path(out) / name))


if __name__ == "__main__":
    main(*sys.argv[1:])
