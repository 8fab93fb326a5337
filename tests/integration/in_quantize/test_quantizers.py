"""One contract for all quantizers: the folder loads back, behaves like the full model, and says how it was made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from toolkit.errors import PreflightError
from toolkit.recipe.quantize import QuantizeSection
from toolkit.stages import Input, Kind, StageContext, StageResult
from toolkit.stages.quantize import Quantize, QuantizeConfig

# Warnings of libraries that only this environment has are theirs to mend.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("default")]

CASES = {
    "gptq": ({"method": "gptq"}, 4, 128, 1.15),
    "gptq8": ({"method": "gptq", "bits": 8}, 8, 128, 1.02),
    "gptq-32": ({"method": "gptq", "group_size": 32}, 4, 32, 1.15),
    "awq": ({"method": "awq"}, 4, 128, 1.15),
    "int8": ({"method": "int8"}, 8, None, 1.03),
    "fp8": ({"method": "fp8"}, 8, None, 1.05),
    "bnb": ({"method": "bnb"}, 4, 64, 1.15),
    "bnb8": ({"method": "bnb", "bits": 8}, 8, None, 1.05),
}
"""Recipe keys, bits, group size, and the recovery bound: perplexity may grow by this factor."""


@dataclass
class Made:
    folder: Path
    result: StageResult
    manifest: dict
    events: list[dict]


def quantize(model: Path, dataset: Path | None, folder: Path, rows: int = 16, **keys) -> Made:
    section = QuantizeSection.model_validate({"calibration": {"rows": rows}, **keys})
    inputs = {"model": Input(model, Kind.model, "m")}
    if dataset:
        inputs["dataset"] = Input(dataset, Kind.dataset, "d")
    for name in ("out", "state"):
        (folder / name).mkdir()
    with (folder / "events").open("w") as events:
        context = StageContext(inputs, folder / "out", folder / "state", folder, events=events)
        result = Quantize().run(QuantizeConfig(quantize=section, max_length=256, seed=1), context)
    lines = [json.loads(line) for line in (folder / "events").read_text().splitlines()]
    manifest = json.loads((folder / "out" / "quantization.json").read_text())
    return Made(folder / "out", result, manifest, lines)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest):
    return request.param, *CASES[request.param]


_made: dict[str, Made] = {}


@pytest.fixture
def made(case, tiny_model: Path, dataset: Path, tmp_path: Path) -> Made:
    name, keys, *_ = case
    if name not in _made:
        _made[name] = quantize(tiny_model, dataset, tmp_path, **keys)
    return _made[name]


def test_quantized_model_keeps_its_perplexity_and_shrinks(case, made: Made):
    bound = case[4]
    metrics = made.result.metrics
    assert 1 < metrics["perplexity_full"] < 400  # uniform over the vocabulary would be 512
    assert 1 / bound < metrics["perplexity"] / metrics["perplexity_full"] < bound
    assert metrics["size_mb"] < metrics["size_mb_full"]


def test_manifest_says_how_it_was_made(case, made: Made):
    _, keys, bits, group, _ = case
    manifest = made.manifest
    assert (manifest["method"], manifest["bits"], manifest["group_size"]) == (
        keys["method"],
        bits,
        group,
    )
    assert manifest["ignore"] == ["lm_head"]
    assert manifest["symmetric"] is True
    assert "torch" in manifest["libraries"]
    calibrated = keys["method"] in ("gptq", "awq", "int8")
    assert manifest["calibration"]["rows"] == (16 if calibrated else 0)
    assert manifest["calibration"]["training_rows"] == (12 if calibrated else 0)
    assert (manifest["calibration"]["sha256"] is not None) == calibrated


def test_config_names_the_format_that_engines_read(case, made: Made):
    _, keys, bits, group, _ = case
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    if keys["method"] == "bnb":
        assert config["quant_method"] == "bitsandbytes"
        assert config["load_in_4bit" if bits == 4 else "load_in_8bit"] is True
        return
    assert config["quant_method"] == "compressed-tensors"
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"], weights["group_size"]) == (bits, True, group)
    assert config["ignore"] == ["lm_head"]


def test_folder_is_self_contained(made: Made, tiny_model: Path):
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (made.folder / name).read_bytes() == (tiny_model / name).read_bytes()


def test_folder_loads_and_answers(made: Made):
    from toolkit.evaluation.generation import generate
    from toolkit.evaluation.loading import load_model, load_tokenizer

    model, tokenizer = load_model(made.folder, "cpu"), load_tokenizer(made.folder)
    answers = dict(generate(model, tokenizer, [[5, 6, 7], [8]], limits=[4, 2], batch_size=2))
    assert set(answers) == {0, 1}


def test_report_shows_answers_side_by_side(made: Made):
    report = json.loads((made.folder / "report.json").read_text())
    assert len(report["generations"]) == 4
    assert {"full", "quantized", "messages"} == set(report["generations"][0])
    text = (made.folder / "report.md").read_text()
    assert "| weights, MB |" in text
    assert "What comes after" in text


def test_progress_moves_through_the_layers(case, made: Made):
    layers = [e["done"] for e in made.events if e["event"] == "progress" and e["unit"] == "layers"]
    assert layers == ([0, 1, 2] if case[1]["method"] in ("gptq", "awq", "int8") else [])


def test_without_a_dataset_general_text_calibrates(tiny_model: Path, tmp_path: Path):
    made = quantize(tiny_model, None, tmp_path, method="gptq")
    assert made.manifest["calibration"]["general_rows"] == 16
    assert made.result.metrics["perplexity"] < 1.15 * made.result.metrics["perplexity_full"]


def test_a_quantized_model_is_refused(tiny_model: Path, dataset: Path, tmp_path: Path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    once = quantize(tiny_model, dataset, tmp_path / "one", method="fp8").folder
    with pytest.raises(PreflightError, match="is quantized already, by compressed-tensors"):
        quantize(once, dataset, tmp_path / "two", method="gptq")


def test_the_served_fp8_base_is_the_trained_one_byte_for_byte(tiny_model: Path, tmp_path: Path):
    """What ``train.base_precision: fp8`` multiplies with, against what an engine reads from the folder."""
    import torch
    from safetensors.torch import load_file

    from toolkit.train.speed.bases import merged_base

    class Adapted:
        def __init__(self, weight: torch.Tensor) -> None:
            self.layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            self.layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)

        def get_base_layer(self) -> torch.nn.Linear:
            return self.layer

    base = load_file(tiny_model / "model.safetensors")
    served = load_file(
        quantize(tiny_model, None, tmp_path, method="fp8").folder / "model.safetensors"
    )
    block = "model.layers.1"
    groups = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    groups += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    for group in groups:
        names = [f"{block}.{name}" for name in group]
        for dtype in (torch.bfloat16, torch.float32):  # as it is loaded on a GPU, and on a CPU
            members = [Adapted(base[f"{name}.weight"].to(dtype)) for name in names]
            weights, scales = merged_base(members, "fp8")
            theirs = torch.cat([served[f"{name}.weight"] for name in names])
            assert theirs.dtype == torch.float8_e4m3fn
            assert torch.equal(weights.view(torch.uint8), theirs.view(torch.uint8)), names
            stored = torch.cat([served[f"{name}.weight_scale"] for name in names])
            assert stored.dtype == torch.bfloat16
            assert torch.equal(scales, stored.float().flatten()), names


def test_a_row_of_zeros_stays_zeros_in_fp8():
    import torch

    from toolkit.models.fp8 import rounded_rows

    weight = torch.randn(4, 64)
    weight[2] = 0
    stored, scale = rounded_rows(weight)
    assert scale[2] == 1
    assert not stored[2].float().any()
    assert (stored.float() * scale[:, None] - weight).abs().max() < weight.abs().max() / 16
