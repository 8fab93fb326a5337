"""Adapter on a quantized base or the merged model quantized: subjects, steps, and what decides."""

import pytest

from toolkit.plan import Observed, make_plan
from toolkit.proof.choice import choose, rivals
from toolkit.recipe.load import Loaded, load

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


def test_a_changed_preference_makes_nothing_again(tmp_path):
    before = steps(loaded(tmp_path))
    after = steps(loaded(tmp_path, RECIPE, "serve.prefer=adapter"))
    assert {n: s.fingerprint for n, s in before.items()} == {
        n: s.fingerprint for n, s in after.items()
    }


def test_without_rivals_nothing_is_chosen(tmp_path):
    given = loaded(tmp_path, RECIPE, "serve.models=[tuned]")
    assert rivals(given.recipe) == ((), ())
    assert choose(given.recipe, {}) is None


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
    assert (insisted.subject, insisted.why) == ("tuned@awq", "serve.prefer is 'adapter'")
    assert choose(loaded(tmp_path, RECIPE, "serve.prefer=merged").recipe, {}).subject == "gptq"


def test_what_was_not_measured_is_said(tmp_path):
    choice = choose(loaded(tmp_path).recipe, {"gptq": {"kl_to_trained": 0.02}})
    assert choice.subject == "tuned@awq", "the first of serve.models"
    assert choice.why == "tuned@awq not measured yet: `toolkit run` does that"
