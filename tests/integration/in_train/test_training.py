"""Every method trains, says what it did, and refuses what cannot work."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from toolkit.data.store import TokenRow, TokenStore
from toolkit.errors import DataError, PreflightError, StepFailedError
from toolkit.stages import Input, Kind
from toolkit.stages.train import Train

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_loss_goes_down(method, train_config, context, logged):
    config = train_config(method=method, max_steps=30, evaluate_every=10)
    ctx = context()
    result = Train().run(config, ctx)
    losses = logged(ctx.output, "loss")
    assert len(losses) == 30
    assert losses[-1] < 0.6 * losses[0]
    heldout = logged(ctx.output, "heldout_loss")
    assert len(heldout) == 3
    assert heldout[-1] < heldout[0]
    assert result.metrics["heldout_loss"] == heldout[-1]
    assert result.metrics["final_loss"] == losses[-1]
    assert result.facts["trained_on"] == ("nf4" if method == "qlora" else "fp32")


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": False},
        {"gradient_checkpointing": True},
        {"optimizer": "adamw_8bit"},
        {"precision": "bf16"},
        {"precision": "bf16", "method": "full", "learning_rate": 3e-3},
        {"precision": "bf16", "method": "qlora"},
        {"lora": {"rank": 4, "rslora": True, "dropout": 0.1, "targets": ["q_proj", "down_proj"]}},
        {"gradient_accumulation": 2, "schedule": "linear", "weight_decay": 0.1},
    ],
    ids=str,
)
def test_loss_goes_down_with(changes, train_config, context, logged):
    ctx = context()
    Train().run(train_config(max_steps=20, **changes), ctx)
    losses = logged(ctx.output, "loss")
    assert losses[-1] < 0.8 * losses[0]


def test_gradient_checkpointing_changes_no_loss(train_config, context, logged):
    plain, saving = context("plain"), context("saving")
    Train().run(train_config(), plain)
    Train().run(train_config(gradient_checkpointing=True), saving)
    assert logged(plain.output, "loss") == pytest.approx(logged(saving.output, "loss"), rel=1e-5)


def test_loss_of_a_step_is_averaged_over_the_tokens_of_all_its_batches(
    train_config, context, logged
):
    whole, parts = context("whole"), context("parts")
    shared = {"packing": False, "max_steps": 1}
    Train().run(train_config(batch_size=64, **shared), whole)
    Train().run(train_config(batch_size=4, gradient_accumulation=16, **shared), parts)
    assert logged(parts.output, "loss") == pytest.approx(logged(whole.output, "loss"), rel=1e-5)
    assert logged(parts.output, "grad_norm") == pytest.approx(
        logged(whole.output, "grad_norm"), rel=1e-4
    )


def test_adapter_folder_is_whole_and_names_no_path(train_config, context, base, tmp_path):
    ctx = context()
    result = Train().run(train_config(), ctx)
    names = {path.name for path in ctx.output.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "metrics.jsonl",
        *("loss.png", "throughput.png", "memory.png"),
    } == names - {"tokenizer_config.json"}
    settings = json.loads((ctx.output / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "tests/small-llama"
    assert str(tmp_path) not in (ctx.output / "adapter_config.json").read_text()
    template = "chat_template.jinja"
    assert (ctx.output / template).read_bytes() == (base / template).read_bytes()
    weights = load_file(ctx.output / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2  # A and B, seven linear layers, two blocks
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert result.facts["rank"] == 8
    assert result.facts["base_fingerprint"] == "b" * 64
    assert result.facts["targets"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_a_run_says_what_it_saw(train_config, context, logged):
    ctx = context()
    result = Train().run(train_config(max_steps=None, epochs=2), ctx)
    assert result.metrics["rows_seen"] == 128
    assert result.metrics["trained_tokens"] == logged(ctx.output, "trained_tokens")[-1]
    assert result.metrics["adapter_effect"] > 0
    assert (ctx.output / "loss.png").stat().st_size > 10_000


def test_the_same_recipe_gives_the_same_bytes(train_config, context):
    first, second = context("first"), context("second")
    for ctx in (first, second):
        Train().run(train_config(), ctx)
    weights = "adapter_model.safetensors"
    assert (first.output / weights).read_bytes() == (second.output / weights).read_bytes()


def test_an_unknown_target_names_the_near_one_and_lists_the_layers(train_config, context):
    config = train_config(lora={"targets": ["q_proj", "up_pro"]})
    with pytest.raises(PreflightError, match=r"'up_pro'.*did you mean 'up_proj'\?") as caught:
        Train().run(config, context())
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


def replaced(ctx, folder, rows):
    import dataclasses

    TokenStore.write(folder / "tokens" / "train", rows)
    TokenStore.write(folder / "tokens" / "heldout", [])
    data = Input(folder, Kind.dataset, "e" * 64, {})
    return dataclasses.replace(ctx, inputs={**ctx.inputs, "dataset": data})


def test_rows_without_a_trained_token_stop_the_run(train_config, context, tmp_path):
    row = TokenRow(np.arange(5, dtype=np.int32), np.zeros(5, bool))
    ctx = replaced(context(), tmp_path / "silent", [row, row])
    with pytest.raises(DataError, match="no trained token"):
        Train().run(train_config(), ctx)


def test_no_heldout_rows_is_fine(train_config, context, tmp_path):
    row = TokenRow(np.arange(5, dtype=np.int32), np.ones(5, bool))
    result = Train().run(train_config(), replaced(context(), tmp_path / "few", [row] * 4))
    assert "heldout_loss" not in result.metrics


def test_a_loss_that_is_not_finite_names_step_and_rows(train_config, context, base, tmp_path):
    import dataclasses

    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.inf)
    broken.save_pretrained(tmp_path / "broken")
    ctx = context()
    model = Input(tmp_path / "broken", Kind.model, "c" * 64, {})
    ctx = dataclasses.replace(ctx, inputs={**ctx.inputs, "model": model})
    with pytest.raises(
        StepFailedError, match=r"loss is nan at step 1, in rows \d+, \d+.*first is 0"
    ):
        Train().run(train_config(), ctx)


def test_an_adapter_that_does_nothing_is_an_error(train_config, context):
    with pytest.raises(
        StepFailedError, match=r"changes no logit|all 14 adapter matrices B at zero"
    ):
        Train().run(train_config(learning_rate=1e-45, max_steps=1), context())
