"""The training benchmark's subjects on its smallest shape: models without files, equal work for all."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3]))  # this environment has nothing of ours installed

from benchmarks.train import weights
from benchmarks.train.cases import Case
from benchmarks.train.clock import Clock
from benchmarks.train.shapes import model_folder
from benchmarks.train.subjects import ours, plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return model_folder("tiny", tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", AutoModelForCausalLM.from_pretrained
    )
    weights.install()


def measured(subject, folder: Path, tmp_path: Path, **changes) -> dict:
    case = Case("case", subject.__name__, shape="tiny", sequence=48, **changes)
    clock = Clock(tmp_path / "case.json", 1, 2, time.time(), {})
    subject.measure(case, 2, folder, clock)
    return json.loads(clock.file.read_text())


def test_a_model_without_files_is_whole_and_always_the_same(folder):
    import torch

    first, second = (weights.random_model(folder, dtype=torch.float32) for _ in range(2))
    assert not list(folder.glob("*.safetensors"))
    assert {p.device.type for p in [*first.parameters(), *first.buffers()]} == {"cpu"}
    ids = torch.arange(32).unsqueeze(0)
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert first.model.norm.weight.unique().tolist() == [1.0]


def test_rotary_tables_are_those_of_transformers(folder):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    theirs = LlamaForCausalLM(AutoConfig.from_pretrained(folder)).model.rotary_emb.inv_freq
    assert weights.random_model(folder).model.rotary_emb.inv_freq.equal(theirs)


def test_four_bits_are_those_that_from_pretrained_would_have_made(folder, tmp_path, monkeypatch):
    import torch

    whole = weights.random_model(folder, dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path)
    made = weights.random_model(folder, dtype=torch.bfloat16, quantization_config=plain.nf4())
    monkeypatch.undo()
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=plain.nf4(), device_map={"": "cpu"}
    )
    assert made.is_loaded_in_4bit is True
    for name in ("q_proj", "o_proj"):
        ours_, theirs = (getattr(m.model.layers[1].self_attn, name).weight for m in (made, read))
        assert torch.equal(ours_.data, theirs.data)
        assert torch.equal(ours_.quant_state.absmax, theirs.quant_state.absmax)


def test_the_toolkit_and_plain_peft_do_the_same_work(folder, tmp_path):
    here = measured(ours, folder, tmp_path)
    there = measured(plain, folder, tmp_path, settings={"recompute": False})
    assert here["trainable_parameters"] == there["trainable_parameters"]
    assert here["losses"][0] == pytest.approx(there["losses"][0], abs=0.01)  # theirs is in bf16
    assert here["tokens_per_step"] == there["tokens_per_step"] == 96
    assert len(here["warm_step_s"]) == 1
    assert len(here["step_s"]) == 2


@pytest.mark.parametrize("rows", ["padded", "bucketed", "packed"])
def test_padding_is_not_counted(folder, tmp_path, rows):
    found = measured(ours, folder, tmp_path, rows=rows)
    assert 0 < found["tokens_per_step"] <= 96


def test_settings_that_a_commit_does_not_know_are_named(folder, tmp_path):
    found = measured(ours, folder, tmp_path, settings={"warp": 9})
    assert found["settings_not_in_this_commit"] == ["warp"]


def test_the_whole_run_leaves_its_numbers_and_its_tables(tmp_path):
    root = Path(__file__).parents[3]
    tool = [sys.executable, root / "benchmarks" / "train"]
    shown = subprocess.run(
        [tool[0], tool[1] / "run.py", "--out", tmp_path, "--shape", "tiny", "--quick",
         "--only", "device,plain-peft"],
        capture_output=True, text=True, check=True, timeout=600,
    ).stdout  # fmt: skip
    kept = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert kept["plain-peft/b1"]["tokens_per_s"] > 0
    assert kept["device/b1"]["bf16_matmul_best_tflops"] >= 0
    assert "plain-peft               b1: " in shown
    tables = subprocess.run(
        [tool[0], tool[1] / "report.py", tmp_path / "results.json"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert "| Transformers + PEFT, keeps activations | 1 x 64 |" in tables
