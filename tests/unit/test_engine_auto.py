"""``serve.engine: auto``: the choice, the sentence that explains it, and where it enters the plan."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.engines.auto import Candidate, choose

VLLM = Candidate("vllm", knows_model=True, architecture="LlamaForCausalLM", ready=True)
SGLANG = replace(VLLM, name="sglang")


def chosen(*candidates):
    choice = choose(candidates)
    return choice.engine, choice.reason


def test_where_both_could_the_first_choice_serves():
    assert chosen(VLLM, SGLANG) == ("vllm", "sglang could too, and vllm is the first choice")
    assert chosen(SGLANG, VLLM) == chosen(VLLM, SGLANG)


def test_an_engine_that_would_be_refused_is_not_chosen():
    bad = replace(VLLM, objections=("rank 1024 is more than vllm takes",))
    engine, reason = chosen(bad, SGLANG)
    assert engine == "sglang"
    assert reason == "vllm would be refused (rank 1024 is more than vllm takes)"


def test_what_both_refuse_is_no_reason():
    both = ("the base is not there",)
    engine, reason = chosen(replace(VLLM, objections=both), replace(SGLANG, objections=both))
    assert engine == "vllm"
    assert "first choice" in reason


def test_an_engine_that_does_not_know_the_model_is_not_chosen():
    stranger = replace(VLLM, knows_model=False, architecture="NewForCausalLM")
    assert chosen(stranger, replace(SGLANG, ready=False)) == (
        "sglang",
        "vllm does not know the architecture NewForCausalLM",
    )


def test_a_model_that_is_not_here_yet_is_no_reason():
    unseen = replace(VLLM, knows_model=None)
    assert chosen(unseen, replace(SGLANG, knows_model=None))[0] == "vllm"


def test_the_engine_that_is_built_is_chosen():
    engine, reason = chosen(replace(VLLM, ready=False), SGLANG)
    assert engine == "sglang"
    assert reason == "its environment is built and that of vllm is not"


RECIPE = """
name: automatic
model: {{source: {source}, max_length: 64}}
serve: {{engine: auto{more}}}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))

    def write(architecture="LlamaForCausalLM", more=""):
        base = tmp_path / "base"
        base.mkdir(exist_ok=True)
        config = {"architectures": [architecture], "max_position_embeddings": 128}
        (base / "config.json").write_text(json.dumps(config))
        (base / "chat_template.jinja").write_text("{{ messages }}")
        (base / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
        file = tmp_path / "recipe.yaml"
        file.write_text(RECIPE.format(source=base, more=more))
        return file

    return write


def prepared(file: Path, profile: str, tmp_path: Path):
    from toolkit.prepare import prepare

    return prepare(file, profile=profile, workspace=tmp_path / "runs")


def test_on_a_cpu_vllm_serves_and_the_step_says_so(recipe, tmp_path):
    done = prepared(recipe(), "local-cpu", tmp_path)
    assert done.choice.engine == "vllm"
    assert "sglang would be refused" in done.choice.reason
    step = done.plan.step("serve-base")
    assert step.config["serve"]["engine"] == "vllm"
    assert step.environments == ("core", "vllm")


def test_the_fingerprint_is_that_of_the_engine_named_by_hand(recipe, tmp_path):
    file = recipe()
    automatic = prepared(file, "local-cpu", tmp_path).plan.step("serve-base").fingerprint
    file.write_text(file.read_text().replace("engine: auto", "engine: vllm"))
    named = prepared(file, "local-cpu", tmp_path)
    assert named.choice is None
    assert named.plan.step("serve-base").fingerprint == automatic


@pytest.mark.parametrize(
    ("architecture", "engine"),
    [
        ("BaichuanForCausalLM", "sglang"),
        ("JetVLMForConditionalGeneration", "sglang"),  # takes pictures
        ("MiMoV2ASRForCausalLM", "sglang"),  # takes speech
        ("AriaForConditionalGeneration", "vllm"),  # takes pictures
    ],
)
def test_a_model_that_one_engine_knows_is_served_by_it(recipe, tmp_path, architecture, engine):
    from toolkit.engines.parsers import command_line

    other = "vllm" if engine == "sglang" else "sglang"
    assert architecture in command_line(engine).architectures - command_line(other).architectures
    gpu = tmp_path / "gpu.yaml"
    gpu.write_text("name: gpu\naccelerator: cuda\n")
    done = prepared(recipe(architecture), str(gpu), tmp_path)
    assert done.choice.engine == engine
    assert f"{other} does not know the architecture {architecture}" in done.choice.reason


def test_env_sync_of_the_recipe_builds_the_engine_that_will_serve(recipe, monkeypatch, tmp_path):
    from toolkit.environments.needs import recipe_environments

    monkeypatch.setenv("TOOLKIT_WORKSPACE", str(tmp_path / "runs"))
    assert "vllm" in recipe_environments(recipe())
