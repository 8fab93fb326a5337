"""The plan says how several GPUs share the training; where it runs is no part of what it is."""

import json

import pytest
from click.testing import CliRunner

from toolkit.prepare import prepare

RECIPE = """
name: shared
model: {source: ./model}
data: {sources: [{path: rows.jsonl}]}
train: {batch_size: 4, gradient_accumulation: 2}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "max_position_embeddings": 4096,
    }  # fmt: skip
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    header = json.dumps({}).encode()
    weights = len(header).to_bytes(8, "little") + header
    (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def planned(folder, profile: str, *overrides: str):
    (folder / "profile.yaml").write_text(f"name: p\n{profile}")
    where = str(folder / "profile.yaml")
    return prepare(folder / "recipe.yaml", overrides, where, workspace=folder / "runs")


def test_one_process_says_nothing(folder):
    done = planned(folder, "accelerator: cpu")
    assert done.launch.ranks == 1
    assert done.training_said is None


def test_two_processes_and_the_batch_of_a_step_are_said(folder):
    done = planned(folder, "accelerator: cpu\nprocesses: 2")
    assert done.plan.step("train").config["train"]["parallel"] == "ddp"
    assert done.training_said == (
        "trained by ddp on 2 processes: nothing has to be shared out on a CPU; "
        "a step sees 16 sequences (4 a pass * 2 * 2)"
    )


def test_gpus_of_a_profile_are_all_used(folder):
    gpus = "accelerator: cuda\ngpu: {memory_gib: 80, count: 4}"
    done = planned(folder, gpus, "train.parallel=zero2")
    assert done.launch.ranks == 4
    assert done.training_said == (
        "trained by zero2 on 4 GPUs; a step sees 32 sequences (4 a pass * 2 * 4)"
    )


def test_several_machines_multiply(folder):
    nodes = "accelerator: cuda\ngpu: {count: 8}\nnodes: {count: 2, rendezvous: 'head:29400'}"
    done = planned(folder, nodes)
    assert (done.launch.ranks, done.launch.rendezvous) == (16, "head:29400")


def test_where_it_runs_does_not_change_what_it_is(folder):
    """Else the checkpoints of an interrupted run would not be found with another number of GPUs."""
    one = planned(folder, "accelerator: cpu")
    two = planned(folder, "accelerator: cpu\nprocesses: 2")
    other = planned(folder, "accelerator: cpu\nprocesses: 2", "train.parallel=fsdp")
    prints = {p.plan.step("train").fingerprint for p in (one, two, other)}
    assert len(prints) == 1


def test_plan_shows_it(folder):
    from toolkit.cli import toolkit

    (folder / "profile.yaml").write_text("name: p\naccelerator: cpu\nprocesses: 2\n")
    where = ["--profile", str(folder / "profile.yaml"), "--workspace", str(folder / "runs")]
    shown = CliRunner().invoke(toolkit, ["plan", str(folder / "recipe.yaml"), *where])
    assert "trained by ddp on 2 processes" in shown.output.replace("\n", " ")
    as_json = CliRunner().invoke(toolkit, ["plan", str(folder / "recipe.yaml"), "--json", *where])
    assert json.loads(as_json.output)["training"] == {
        "processes": 2,
        "nodes": 1,
        "rendezvous": None,
        "parallel": "ddp",
        "reason": "nothing has to be shared out on a CPU",
        "effective_batch": 16,
        "speed": {"fast": False, "packs": False, "reason": "there is no GPU", "certain": True},
    }
