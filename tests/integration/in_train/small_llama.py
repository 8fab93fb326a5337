"""A small Llama with real files around it, and rows that it can learn."""

from pathlib import Path

import numpy as np
import torch

from toolkit.data.store import TokenRow

VOCABULARY = 96


def small_llama(folder: Path, tied: bool = True) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # large enough that a wrong mask moves logits far
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=16, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def counting_rows(count: int, seed: int) -> list[TokenRow]:
    """A question of a start and a stride, answered by counting on: the answer alone is trained."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(random.integers(6, 20))
        start, stride = int(random.integers(3, 40)), int(random.integers(1, 3))
        ids = start + stride * np.arange(length)
        trained = np.arange(length) >= 3
        rows.append(TokenRow(ids.astype(np.int32) % VOCABULARY, trained))
    return rows
