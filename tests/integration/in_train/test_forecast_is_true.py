"""The forecast against the bytes that are alive while Transformers and PEFT take a step, counted."""

import pytest
import torch
from live_bytes import measure
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from toolkit.forecast import training
from toolkit.forecast.block import Rows
from toolkit.forecast.training import Setup, kept_by_block
from toolkit.preflight.base_facts import BaseFacts, shape_of
from toolkit.recipe.train import LoraSection
from toolkit.train.model import add_adapter

pytestmark = pytest.mark.integration

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LENGTH = 192


def build(config, method, width, keep, targets):
    dtype = torch.float32 if method == "full" or width == 4 else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    if keep == "nothing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if method == "lora":
        model = add_adapter(model, LoraSection(rank=4, targets=targets), "small")
    elif width == 2:
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model.train()


def compare(
    kind, method, width, keep, *, trained=LENGTH, packed=False, sequences=1, targets="all-linear"
):
    """(forecast, measured) of what one block keeps, and of the peak of all."""
    seen = {}
    for layers in (2, 3):
        config = kind(num_hidden_layers=layers, **SIZES)
        model = build(config, method, width, keep, targets)
        seen[layers] = measure(model, sequences, LENGTH, trained, packed=packed)
    shape = shape_of(BaseFacts(config.to_dict()))
    chosen = tuple(shape.linears) if targets == "all-linear" else targets
    rows = Rows(sequences, LENGTH, trained, packed)
    base = "bf16" if width == 2 else "fp32"
    setup = Setup(shape, method, base, width, rows, chosen, 4, keep)
    moments = training.moments(setup, training.FLOAT * setup.trained_weights)
    peak = max(sum(moment.values()) for moment in moments)
    block = seen[3].kept - seen[2].kept
    return (kept_by_block(setup), block), (peak, seen[3].peak)


@pytest.mark.parametrize("keep", ["everything", "nothing"])
@pytest.mark.parametrize(("method", "width"), [("lora", 2), ("lora", 4), ("full", 2), ("full", 4)])
def test_a_llama_keeps_what_is_forecast(method, width, keep):
    (block, seen), (peak, seen_peak) = compare(LlamaConfig, method, width, keep)
    assert block == pytest.approx(seen, rel=0.01)
    assert peak == pytest.approx(seen_peak, rel=0.08)  # at this size gradients are half of it


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, Gemma2Config, Gemma3TextConfig])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_so_do_its_kin(kind, method):
    (block, seen), (peak, seen_peak) = compare(kind, method, 2, "everything")
    assert block == pytest.approx(seen, rel=0.01)
    assert peak == pytest.approx(seen_peak, rel=0.06)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("sequences", [1, 2])
def test_packed_rows_pay_for_their_mask(width, sequences):
    found = compare(LlamaConfig, "lora", width, "everything", packed=True, sequences=sequences)
    (block, seen), (peak, seen_peak) = found
    assert block == pytest.approx(seen, rel=0.01)
    assert peak == pytest.approx(seen_peak, rel=0.06)


@pytest.mark.parametrize("keep", ["everything", "nothing"])
def test_few_trained_tokens_need_few_logits(keep):
    _, (peak, seen) = compare(LlamaConfig, "lora", 2, keep, trained=8)
    assert peak == pytest.approx(seen, rel=0.06)


def test_an_adapter_on_two_layers_keeps_less():
    (block, seen), (peak, seen_peak) = compare(
        LlamaConfig, "lora", 2, "everything", targets=("q_proj", "v_proj")
    )
    assert block == pytest.approx(seen, rel=0.01)
    assert peak == pytest.approx(seen_peak, rel=0.06)
