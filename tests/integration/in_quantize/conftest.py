"""A random small model and a small dataset artifact, made on the spot: these tests run in the quantize environment."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3]))

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama: hidden 128, 2 layers, MLP 256, byte-level vocabulary of 512."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from toolkit.quantizers.calibration import general_text

    folder = tmp_path_factory.mktemp("tiny")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([row["text"] for row in general_text() if "text" in row], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", bos_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=2, bos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    _fit(model, tokenizer, general_text())
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _fit(model, tokenizer, rows) -> None:
    """Two dozen steps, so that perplexity is far from uniform and quantization has something to lose."""
    import torch

    from toolkit.quantizers.calibration import tokenize

    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    ids = torch.tensor([token for row in rows for token in tokenize(row, tokenizer)])
    for step in range(24):
        start = step * 1024 % (len(ids) - 1024)
        batch = ids[start : start + 1024].view(8, 128)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def dataset(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset artifact: 24 training and 12 held-out conversations, tokenized by the tiny model's template."""
    folder = tmp_path_factory.mktemp("dataset")
    for split, numbers in (("train", range(24)), ("heldout", range(100, 112))):
        rows = [_conversation(number) for number in numbers]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        _write_tokens(folder / "tokens" / split, rows, tiny_model)
    return folder


def _conversation(number: int) -> dict:
    messages = [
        {"role": "system", "content": "Add one."},
        {"role": "user", "content": f"What comes after {number}?"},
        {"role": "assistant", "content": str(number + 1)},
    ]
    return {
        "id": hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16],
        "messages": messages,
    }


def _write_tokens(folder: Path, rows: list[dict], model: Path) -> None:
    import numpy as np

    from toolkit.data.store import TokenRow, TokenStore
    from toolkit.evaluation.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    kept = []
    for row in rows:
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)[
            "input_ids"
        ]
        asked = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        trained = np.arange(len(whole)) >= len(asked)
        kept.append(TokenRow(np.array(whole, np.int32), trained))
    TokenStore.write(folder, kept)
