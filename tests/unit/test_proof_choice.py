"""Adapter on a quantized base or the merged model quantized: subjects, steps, and what decides."""

import json

import pytest

from toolkit.plan import Observed, make_plan
from toolkit.proof import choice as choice_module
from toolkit.proof.choice import numbers_of, rivals
from toolkit.recipe.load import Loaded, load
from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.choose import Choose, ChooseConfig

RECIPE = """
name: tickets
model: {source: ./base, max_length: 512}
data: {sources: [{path: rows.jsonl}]}
train: {method: lora}
quantize:
  - {method: gptq}
  - {method: awq, of: base}
evaluate: {metrics: [exact_match], of: [tuned]}
serve: {models: ["tuned@awq", gptq]}
"""


def loaded(tmp_path, text: str = RECIPE, *overrides: str) -> Loaded:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return load(path, overrides)


def choose(recipe, numbers):
    return choice_module.choose(rivals(recipe), numbers)


def steps(given: Loaded):
    files = dict.fromkeys(("./base", "rows.jsonl"), "0")
    return {s.name: s for s in make_plan(given, Observed(files)).steps}


def test_the_adapter_on_a_quantized_base_is_a_subject(tmp_path):
    given = loaded(tmp_path)
    assert given.recipe.subjects == ("base", "tuned", "merged", "gptq", "awq", "tuned@awq")
    assert given.recipe.serves_trained_adapter
    plan = steps(given)
    assert plan["quantize-awq"].inputs["model"] == "fetch"
    assert plan["quantize-gptq"].inputs["model"] == "export-merged"
    assert plan["serve-tuned@awq"].inputs == {
        "dataset": "data", "model": "quantize-awq", "adapter": "export-adapter",
    }  # fmt: skip


def test_nothing_is_merged_that_nobody_reads(tmp_path):
    text = RECIPE.replace("  - {method: gptq}\n", "").replace(", gptq]", "]")
    assert "export-merged" not in steps(loaded(tmp_path, text))


def test_a_changed_preference_makes_nothing_but_the_choice_again(tmp_path):
    before = steps(loaded(tmp_path))
    after = steps(loaded(tmp_path, RECIPE, "serve.prefer=adapter"))
    assert [n for n, s in after.items() if s.fingerprint != before[n].fingerprint] == ["choose"]


def test_the_choice_is_a_step_of_its_own_after_what_it_reads(tmp_path):
    plan = steps(loaded(tmp_path, RECIPE.replace("of: [tuned]", "of: [tuned, gptq, tuned@awq]")))
    assert list(plan)[-1] == "choose"
    assert list(plan["choose"].inputs) == [
        "serve-tuned@awq", "evaluate-tuned@awq", "serve-gptq", "evaluate-gptq",
    ]  # fmt: skip
    assert plan["choose"].config == {
        "subjects": ["tuned@awq", "gptq"], "prefer": "measured", "metric": "exact_match",
    }  # fmt: skip
    assert "choose" not in steps(loaded(tmp_path, RECIPE, "serve.models=[gptq]"))


def finished(folder, metrics) -> Input:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"metrics": metrics}))
    return Input(folder, Kind.report, "0")


def test_the_choice_is_kept_with_its_numbers(tmp_path):
    """A serve step's own exact_match is of two rows: the evaluation's counts."""
    measured = {
        "serve-gptq": {"kl_to_trained": 0.05, "exact_match": 1.0},
        "evaluate-gptq": {"exact_match": 0.8, "rows": 50},
        "serve-tuned@awq": {"kl_to_trained": 0.049, "exact_match": 0.0},
        "evaluate-tuned@awq": {"exact_match": 0.9, "rows": 50},
    }
    inputs = {name: finished(tmp_path / name, metrics) for name, metrics in measured.items()}
    (tmp_path / "out").mkdir()
    ctx = StageContext(inputs, tmp_path / "out", tmp_path, tmp_path)
    config = ChooseConfig(subjects=("tuned@awq", "gptq"), prefer="measured", metric="exact_match")
    result = Choose().run(config, ctx)
    assert result.facts == {
        "subject": "tuned@awq",
        "why": "measured against what was trained (gptq: KL 0.0500, exact_match 0.800; "
        "tuned@awq: KL 0.0490, exact_match 0.900)",
    }
    assert result.metrics == {
        "gptq.kl_to_trained": 0.05, "gptq.exact_match": 0.8,
        "tuned@awq.kl_to_trained": 0.049, "tuned@awq.exact_match": 0.9,
    }  # fmt: skip
    kept = json.loads((tmp_path / "out" / "choice.json").read_text())
    assert kept["subject"] == "tuned@awq"
    assert kept["numbers"]["gptq"] == {"exact_match": 0.8, "kl_to_trained": 0.05}


def test_the_score_of_a_serve_steps_own_questions_is_no_task_metric():
    assert numbers_of("a", {"kl_to_trained": 0.1, "exact_match": 1.0}, {}) == {
        "a": {"kl_to_trained": 0.1}
    }


def test_without_rivals_nothing_is_chosen(tmp_path):
    given = loaded(tmp_path, RECIPE, "serve.models=[tuned]")
    assert rivals(given.recipe) is None


@pytest.mark.parametrize(
    ("numbers", "subject"),
    [
        ({"gptq": {"kl_to_trained": 0.02}, "tuned@awq": {"kl_to_trained": 0.05}}, "gptq"),
        ({"gptq": {"kl_to_trained": 0.05}, "tuned@awq": {"kl_to_trained": 0.02}}, "tuned@awq"),
        ({"gptq": {"kl_to_trained": 0.05}, "tuned@awq": {"kl_to_trained": 0.049}}, "gptq"),
        (
            {
                "gptq": {"kl_to_trained": 0.05, "exact_match": 0.8},
                "tuned@awq": {"kl_to_trained": 0.049, "exact_match": 0.9},
            },
            "tuned@awq",
        ),
    ],
)
def test_the_nearer_one_is_served_and_a_tie_goes_to_the_task_and_then_to_the_merged(
    tmp_path, numbers, subject
):
    choice = choose(loaded(tmp_path).recipe, numbers)
    assert choice.subject == subject
    assert f"gptq: KL {numbers['gptq']['kl_to_trained']:.4f}" in choice.why


def test_the_recipe_can_insist(tmp_path):
    numbers = {"gptq": {"kl_to_trained": 0.02}, "tuned@awq": {"kl_to_trained": 0.05}}
    insisted = choose(loaded(tmp_path, RECIPE, "serve.prefer=adapter").recipe, numbers)
    assert insisted.subject == "tuned@awq"
    assert insisted.why == "serve.prefer is 'adapter'; gptq: KL 0.0200; tuned@awq: KL 0.0500"
    assert choose(loaded(tmp_path, RECIPE, "serve.prefer=merged").recipe, {}).subject == "gptq"


def test_what_was_not_measured_is_said(tmp_path):
    choice = choose(loaded(tmp_path).recipe, {"gptq": {"kl_to_trained": 0.02}})
    assert choice.subject == "tuned@awq", "the first of serve.models"
    assert choice.why == "tuned@awq not measured yet: `toolkit run` does that"
