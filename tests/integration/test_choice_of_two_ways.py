"""`toolkit run` says which way to serve a quantized tuned model, and logs what it was chosen by."""

import json

import pytest
from click.testing import CliRunner

from tests.adapter_folders import write_base
from toolkit import artifact
from toolkit.cli import toolkit as command_line
from toolkit.prepare import examine

pytestmark = pytest.mark.integration

RECIPE = """
name: tickets
model: {source: ./base, max_length: 512, chat_template: ./chat.jinja}
data: {sources: [{path: rows.jsonl}]}
train: {method: lora, lora: {rank: 4, targets: [q_proj]}}
quantize:
  - {method: gptq}
  - {method: awq, of: base}
evaluate: {metrics: [exact_match], of: [gptq, "tuned@awq"]}
serve: {engine: vllm, models: ["tuned@awq", gptq]}
"""
METRICS = {
    "serve-gptq": {"kl_to_trained": 0.21, "exact_match": 0.0},
    "evaluate-gptq": {"exact_match": 0.75, "rows": 40},
    "serve-tuned@awq": {"kl_to_trained": 0.08, "exact_match": 1.0},
    "evaluate-tuned@awq": {"exact_match": 0.875, "rows": 40},
}


@pytest.fixture
def recipe(tmp_path):
    """Everything is made but the choice."""
    config = write_base(tmp_path / "base") / "config.json"
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    config.write_text(json.dumps(json.loads(config.read_text()) | sizes))
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    prepared = examine(file, (), None, tmp_path / "runs")
    for step in prepared.plan.steps:
        if step.stage != "choose":
            place = prepared.workspace.artifact(step.stage, step.fingerprint)
            artifact.part_of(place).mkdir(parents=True)
            manifest = {
                "recipe": "tickets", "step": step.name, "stage": step.stage,
                "kind": step.kind.value, "fingerprint": step.fingerprint,
                "identity": dict(step.identity), "metrics": METRICS.get(step.name, {}),
                "facts": {"digest": "0", "revision": None}, "seconds": 1.0, "peak_memory_gib": 0.1,
                "created": "2026-01-01T00:00:00+00:00", "mlflow": None,
            }  # fmt: skip
            artifact.publish(place, manifest)
    return file


def test_the_choice_is_shown_stored_and_logged(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = ["run", str(recipe), "--workspace", str(tmp_path / "runs")]
    done = CliRunner().invoke(command_line, words)
    assert done.exit_code == 0, (done.output, done.exception)
    why = "measured against what was trained (gptq: KL 0.2100, exact_match 0.750; "
    why += "tuned@awq: KL 0.0800, exact_match 0.875)"
    assert f"`toolkit serve` takes tuned@awq: {why}" in done.output

    again = json.loads(CliRunner().invoke(command_line, [*words, "--json"]).stdout)
    assert again["mlflow_run"] is None, "a second run is free"
    assert again["choice"] == {"subject": "tuned@awq", "why": why}
    step = next(s for s in again["steps"] if s["name"] == "choose")
    kept = json.loads((artifact.find(tmp_path / step["artifact"]).path / "choice.json").read_text())
    assert kept["numbers"]["tuned@awq"] == {"exact_match": 0.875, "kl_to_trained": 0.08}

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("tickets").experiment_id])
    runs = {r.info.run_name: r.data for r in found}
    assert runs["tickets"].tags["toolkit.choice"] == "tuned@awq"
    assert runs["tickets"].tags["toolkit.choice.why"] == why
    assert runs["tickets"].metrics["choose.gptq.kl_to_trained"] == 0.21
    assert runs["choose"].metrics["tuned_awq.exact_match"] == 0.875
