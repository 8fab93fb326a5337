"""``train.speed: auto``: what is chosen, the sentence that explains it, and what layers keep."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from toolkit.recipe.train import TrainSection
from toolkit.train.speed.choose import KEEPS, SLOWER, LayerBytes, Machine, choose, keep_for

LLAMA = {"architectures": ["LlamaForCausalLM"]}
HOPPER = Machine("cuda", 9.0)
LLAMA_8B = LayerBytes(hidden=4096, inner=14336, queries=4096, keys=1024)


def reason(section=None, config=LLAMA, machine=HOPPER):
    choice = choose(section or TrainSection(), config, machine)
    return choice.path, choice.reason


def test_a_known_architecture_on_a_gpu_takes_the_fast_path():
    path, why = reason()
    assert path == "fast"
    assert why == (
        "layers compiled with the adapter inside, a loss that never holds all logits, "
        "packed rows kept apart without a mask"
    )


def test_what_is_not_known_yet_is_said():
    section = TrainSection(packing=False)
    parts = "layers compiled with the adapter inside, a loss that never holds all logits"
    unfetched = choose(section, None, HOPPER)
    assert unfetched.fast
    assert not unfetched.certain
    assert unfetched.reason == (
        f"{parts}; not certain before the base is fetched: some architectures take the plain path"
    )
    silent = choose(section, LLAMA, Machine("cuda"))
    assert not silent.certain
    assert silent.reason == (
        f"{parts}; not certain without gpu.capability in the profile: bf16 begins with 8.0"
    )
    assert choose(section, LLAMA, HOPPER).certain
    assert choose(section, None, Machine("cpu")).certain


@pytest.mark.parametrize(
    ("changes", "config", "machine", "why"),
    [
        ({"speed": "plain"}, LLAMA, HOPPER, "train.speed says so"),
        ({}, LLAMA, Machine("cpu"), "there is no GPU"),
        ({}, LLAMA, Machine("cuda", 7.5), "the GPU's compute capability is 7.5, and bf16 begins with 8.0"),
        ({"precision": "fp32"}, LLAMA, HOPPER, "train.precision is fp32, and the fast path computes in bf16"),
        ({"objective": "orpo"}, LLAMA, HOPPER, "train.objective is orpo, and the fast path is for sft"),
        ({"method": "full"}, LLAMA, HOPPER, "train.method is full, and the fast path is for adapters"),
        (
            {},
            {"architectures": ["MambaForCausalLM"]},
            HOPPER,
            "the fast path is not tested with MambaForCausalLM",
        ),
        ({}, LLAMA | {"quantization_config": {"quant_method": "gptq"}}, HOPPER,
         "the base is quantized already, and the fast path takes none that is"),
    ],
)  # fmt: skip
def test_anything_else_falls_back_and_says_why(changes, config, machine, why):
    assert reason(TrainSection(**changes), config, machine) == ("plain", why)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["MistralForCausalLM"], "sliding_window": 4096},
        {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0},
        {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["sliding_attention", "full_attention"]},
    ],
)  # fmt: skip
def test_windows_and_capped_scores_keep_the_model_s_own_mask(config):
    choice = choose(TrainSection(), config, HOPPER)
    assert choice.fast
    assert not choice.packs


def test_an_unused_window_is_no_window():
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "sliding_window": 4096,
        "use_sliding_window": False,
    }
    assert choose(TrainSection(), config, HOPPER).packs


def test_fp8_is_for_a_frozen_dense_base():
    for method in ("qlora", "full"):
        with pytest.raises(ValidationError, match="base_precision fp8 is for method lora"):
            TrainSection(method=method, base_precision="fp8")


def test_with_room_every_layer_keeps_its_products():
    assert keep_for(LLAMA_8B, 32, 3 * 4096, 60e9) == ["products"] * 32


def test_without_room_every_layer_keeps_its_input_alone():
    assert keep_for(LLAMA_8B, 32, 4096, 1e9) == ["nothing"] * 32


@given(tokens=st.integers(1, 60_000), free=st.floats(0, 90e9))
def test_what_is_kept_fits_or_is_least(tokens, free):
    keep = keep_for(LLAMA_8B, 32, tokens, free)
    held = sum(LLAMA_8B.kept(one) for one in keep) * tokens
    assert len(keep) == 32
    assert held + LLAMA_8B.passing * tokens <= free or keep == ["nothing"] * 32


@given(tokens=st.integers(1, 60_000), free=st.floats(0, 90e9), more=st.floats(0, 30e9))
def test_more_memory_never_computes_more_again(tokens, free, more):
    def cost(room):
        return sum(SLOWER[one] for one in keep_for(LLAMA_8B, 32, tokens, room))

    assert cost(free + more) <= cost(free) + 1e-9


def test_policies_are_ordered_by_bytes_and_by_work():
    sizes = [LLAMA_8B.kept(keep) for keep in KEEPS]
    assert sizes == sorted(sizes, reverse=True)
    assert [SLOWER[keep] for keep in KEEPS] == sorted(SLOWER[keep] for keep in KEEPS)


def test_the_plan_says_which_path_and_why(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from toolkit.cli import toolkit as command_line

    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(LLAMA | {"max_position_embeddings": 128}))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: quick\nmodel: {{source: {base}, max_length: 64}}\n"
        "data: {sources: [{path: rows.jsonl}]}\ntrain: {method: lora}\n"
    )
    workspace = ["--workspace", str(tmp_path / "runs")]
    profiles = {"cpu": "name: cpu\naccelerator: cpu\n"}
    profiles["cuda"] = "name: gpu\naccelerator: cuda\ngpu: {memory_gib: 80, capability: 9.0}\n"
    nodes = "nodes: {count: 2, rendezvous: head:29400}\n"
    profiles["nodes"] = profiles["cuda"].replace("name: gpu", "name: nodes") + nodes
    said = {}
    for name, text in profiles.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(text)
        given = ["--set", "train.parallel=fsdp"] if name == "nodes" else []
        done = CliRunner().invoke(
            command_line, ["plan", str(recipe), "--on", str(file), *workspace, *given]
        )
        assert done.exit_code == 0, done.output
        said[name] = done.output
    assert "trained by the plain path (train.speed: auto): there is no GPU" in said["cpu"]
    assert "trained by the fast path (train.speed: auto): layers compiled" in said["cuda"]
    assert "not certain" not in said["cuda"]
    assert "(train.speed: auto): train.parallel is fsdp, which shares out" in said["nodes"]
