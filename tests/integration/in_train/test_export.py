"""What is exported is what was trained."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_llama import small_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolkit.data.store import TokenStore
from toolkit.errors import PreflightError, StepFailedError
from toolkit.models.fp8 import round_layers
from toolkit.recipe.train import TrainSection
from toolkit.stages import Input, Kind
from toolkit.stages.export import Export, ExportConfig
from toolkit.stages.train import Train
from toolkit.train.effect import row_logits
from toolkit.train.model import Numerics, build_model, load_base

pytestmark = pytest.mark.integration


@pytest.fixture
def trained(train_config, context):
    """Train with a method, hand back what the worker would: the artifact with its facts."""

    def run(**changes) -> Input:
        ctx = context(f"train-{len(changes)}")
        result = Train().run(train_config(**changes), ctx)
        return Input(ctx.output, Kind.adapter, "a" * 64, result.facts)

    return run


@pytest.fixture
def row(dataset):
    return TokenStore(dataset / "tokens" / "heldout")[3]


def logits_of(folder, row):
    return row_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), row)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merged_equals_adapter_in_logits(precision, trained, context, base, row):
    adapter = trained(precision=precision)
    ctx = context("export", adapter=adapter)
    result = Export().run(ExportConfig(format="merged", dtype="fp32"), ctx)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = row_logits(PeftModel.from_pretrained(model, adapter.path), row)
    difference = (logits_of(ctx.output, row) - expected).abs().max()
    assert difference < 1e-4
    assert result.metrics["merge_error"] < 1e-4
    assert result.metrics["stored_error"] < 1e-4
    assert (expected - logits_of(base, row)).abs().max() > 1  # the adapter does act


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_after_qlora_merged_equals_the_4_bit_forward(precision, trained, context, base, row):
    adapter = trained(method="qlora", precision=precision)
    ctx = context("export", adapter=adapter)
    result = Export().run(ExportConfig(format="merged", dtype="fp32", method="qlora"), ctx)
    quantized = load_base(base, Numerics(precision, quantized=True), "cpu")
    trained_forward = row_logits(PeftModel.from_pretrained(quantized, adapter.path), row)
    merged = logits_of(ctx.output, row)
    error = (merged - trained_forward).abs().max()
    assert error < (1e-3 if precision == "fp32" else 0.5)  # bf16 activations round
    assert result.metrics["merge_error"] < 1e-4
    on_plain_base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrong = row_logits(PeftModel.from_pretrained(on_plain_base, adapter.path), row)
    assert (
        wrong - trained_forward
    ).abs().max() > 3 * error  # merging into the 16-bit base is not it
    assert "quantization_config" not in json.loads((ctx.output / "config.json").read_text())


def test_after_training_on_fp8_the_merge_is_into_what_fp8_leaves(trained, context, base, row):
    adapter = trained(base_precision="fp8")
    assert adapter.facts["trained_on"] == "fp8"
    ctx = context("export", adapter=adapter)
    result = Export().run(ExportConfig(format="merged", dtype="fp32"), ctx)
    assert result.metrics["merge_error"] < 1e-4
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrong = row_logits(PeftModel.from_pretrained(plain, adapter.path), row)
    rounded = round_layers(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter.facts["targets"]
    )
    config = TrainSection(base_precision="fp8", lora={"rank": 8, "alpha": 16})
    model = build_model(base, config, Numerics("fp32", False, fp8=True), "cpu", {})
    found = 0
    for name, layer in model.get_base_model().named_modules():
        if group := getattr(layer, "speed_group", None):  # what training multiplies with
            weight, scale = group.frozen[:2]
            dense = rounded.get_submodule(name).weight
            assert torch.equal(weight.float() * scale[:, None], dense), name
            found += 1
    assert found == 14
    expected = row_logits(PeftModel.from_pretrained(rounded, adapter.path), row)
    merged = logits_of(ctx.output, row)
    assert (merged - expected).abs().max() < 1e-3
    assert (wrong - expected).abs().max() > 0.1  # merging into the base as it was is not it


def test_merged_folder_is_self_contained_and_of_the_asked_type(trained, context, base):
    ctx = context("export", adapter=trained())
    result = Export().run(ExportConfig(format="merged", card={"recipe": "counting"}), ctx)
    weights = load_file(ctx.output / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    settings = json.loads((ctx.output / "config.json").read_text())
    assert settings["dtype"] == "bfloat16"
    assert settings["use_cache"] is True
    for name in ("chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (ctx.output / name).read_bytes() == (base / name).read_bytes()
    assert AutoTokenizer.from_pretrained(ctx.output)("w3 w4")["input_ids"] == [3, 4]
    assert "# counting" in (ctx.output / "README.md").read_text()
    assert result.facts["dtype"] == "bf16"
    assert result.facts["merge_error"] < 1e-4
    assert 0 < result.metrics["stored_error"] < 1


def test_untied_head_merges_too(trained, context, tmp_path, dataset, row):
    import dataclasses

    folder = small_llama(tmp_path / "untied", tied=False)
    adapter = trained()  # trained on another base of equal shape: good enough to add
    ctx = context("export", adapter=adapter)
    untied = Input(folder, Kind.model, "b" * 64, {})
    ctx = dataclasses.replace(ctx, inputs={**ctx.inputs, "model": untied})
    result = Export().run(ExportConfig(format="merged", dtype="fp32"), ctx)
    assert "lm_head.weight" in load_file(ctx.output / "model.safetensors")
    assert result.metrics["stored_error"] < 1e-4


def test_adapter_folder_loads_on_the_base(trained, context, base, row):
    adapter = trained()
    ctx = context("export", adapter=adapter)
    result = Export().run(ExportConfig(format="adapter", card={"recipe": "counting"}), ctx)
    names = {path.name for path in ctx.output.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} < names
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} < names
    assert not names & {"metrics.jsonl", "loss.png", "config.json"}
    model = AutoModelForCausalLM.from_pretrained(base)
    before = row_logits(model, row)
    assert (row_logits(PeftModel.from_pretrained(model, ctx.output), row) - before).abs().max() > 1
    assert result.facts["rank"] == 8
    settings = json.loads((ctx.output / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "tests/small-llama"
    assert settings["r"] == 8
    assert "rank 8 for `tests/small-llama`" in (ctx.output / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_full_fine_tune_exports_its_weights(dtype, trained, context, row):
    source = trained(method="full", learning_rate=1e-3)
    ctx = context("export", adapter=source)
    Export().run(ExportConfig(format="merged", dtype=dtype, method="full"), ctx)
    error = (logits_of(ctx.output, row) - logits_of(source.path, row)).abs().max()
    assert error == 0 if dtype == "fp32" else 0 < error < 1


def test_full_fine_tune_has_no_adapter_to_export(context):
    with pytest.raises(PreflightError, match="there is no adapter"):
        Export().run(ExportConfig(format="adapter", method="full"), context())


def test_a_merge_that_is_not_exact_is_refused(trained, context, monkeypatch):
    from toolkit.train import merge

    monkeypatch.setattr(merge, "MERGE_TOLERANCE", -1.0)
    ctx = context("export", adapter=trained())
    with pytest.raises(StepFailedError, match="the merged model is not the trained one"):
        Export().run(ExportConfig(format="merged"), ctx)
