"""A small Llama with real files around it, and rows that it can learn: seconds on one core."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from toolkit.data.store import TokenRow, TokenStore
from toolkit.recipe.train import TrainSection
from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.train import TrainConfig

VOCABULARY = 96
MAX_LENGTH = 48


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


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return small_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    TokenStore.write(folder / "tokens" / "train", counting_rows(64, seed=1))
    TokenStore.write(folder / "tokens" / "heldout", counting_rows(12, seed=2))
    return folder


@pytest.fixture
def train_config():
    def build(**changes) -> TrainConfig:
        values = {
            "method": "lora",
            "lora": {"rank": 8, "alpha": 16},
            "max_steps": 8,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "checkpoint_every": None,
        }
        return TrainConfig(train=TrainSection(**(values | changes)), max_length=MAX_LENGTH, seed=3)

    return build


@pytest.fixture
def context(tmp_path, base, dataset):
    """Contexts of steps that read the small base and dataset, each with an empty output folder."""

    def build(name: str = "run", adapter: Input | None = None, **changes) -> StageContext:
        inputs = {
            "model": Input(base, Kind.model, "b" * 64, {"source": "tests/small-llama"}),
            "dataset": Input(dataset, Kind.dataset, "d" * 64, {}),
        }
        if adapter is not None:
            inputs["adapter"] = adapter
        output, state = tmp_path / name / "output", tmp_path / name / "state"
        output.mkdir(parents=True)
        state.mkdir(exist_ok=True)
        made = StageContext(inputs, output, state, tmp_path)
        return dataclasses.replace(made, **changes)

    return build


@pytest.fixture
def logged():
    def read(folder: Path, key: str) -> list[float]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["metrics"][key] for line in lines if key in line["metrics"]]

    return read
