"""The demo recipe on a GPU host, through a profile that maps environments to the host's interpreter.

Run there with ``python3 -m pytest -m gpu tests/gpu``; ``host.py`` says which variables it reads.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu.host import answer, marks, on_recipe, project_folder

pytestmark = marks


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    return project_folder(tmp_path_factory)


@pytest.fixture(scope="session")
def finished(project) -> dict[str, dict]:
    """The demo with its real gates, served by vLLM; steps by name."""
    outcome = answer(on_recipe(project, "run"), project)
    assert all(gate["passed"] for gate in outcome["gates"])
    return {s["name"]: s for s in outcome["steps"]}


def test_the_demo_reaches_its_goals(finished):
    scores = {
        s: finished[f"evaluate-{s}"]["metrics"]["json_match"] for s in ("base", "tuned", "gptq")
    }
    print({name: step["seconds"] for name, step in finished.items()}, scores)
    assert scores["base"] < 0.05
    assert scores["tuned"] >= 0.8
    assert scores["gptq"] >= scores["tuned"] - 0.03


def test_training_ran_on_the_gpu(finished):
    facts = json.loads((Path(finished["train"]["artifact"]) / "manifest.json").read_text())["facts"]
    assert facts["trained_on"] == "bf16"


@pytest.mark.parametrize("subject", ["tuned", "gptq"])
def test_vllm_answers_with_each_model(finished, subject):
    folder = Path(finished[f"serve-{subject}"]["artifact"])
    answers = json.loads((folder / "answers.json").read_text())
    assert answers
    assert all(a["answer"].strip() for a in answers)


def test_sglang_serves_the_base_with_the_adapter(project, finished):
    ran = on_recipe(
        project, "run", "--set", "serve.engine=sglang", "--set", "serve.models=[tuned]",
        "--set", "serve.extra_args=['--attention-backend','triton','--sampling-backend','pytorch']",
    )  # fmt: skip
    outcome = answer(ran, project)
    served = {s["name"]: s for s in outcome["steps"]}["serve-tuned"]
    answers = json.loads((Path(served["artifact"]) / "answers.json").read_text())
    assert all(a["answer"].strip() for a in answers)
