"""Rules on a base that is frozen in FP8, and on objectives over several processes."""

import pytest

from toolkit.preflight import Outcome, fp8_base, parallel
from toolkit.preflight.facts import Facts
from toolkit.preflight.gpu import described
from toolkit.recipe import Recipe
from toolkit.recipe.train import TrainSection
from toolkit.train.parallel.choose import choose


def recipe(quantize=(), models=None, **train) -> Recipe:
    values = {
        "name": "r", "model": {"source": "./model"}, "data": {"sources": [{"path": "rows.jsonl"}]},
        "train": {"base_precision": "fp8"} | train, "quantize": list(quantize),
    }  # fmt: skip
    return Recipe.model_validate(values | ({"serve": {"models": models}} if models else {}))


def judged(rule, given: Recipe, tmp_path, capability: float | None = 9.0, **facts):
    gpu = described(80, capability, 1)
    return rule.judge(given, Facts(tmp_path, "cuda", gpu=gpu, **facts))


@pytest.mark.parametrize(
    ("capability", "refused"), [(8.0, True), (8.6, True), (8.9, False), (9.0, False), (None, False)]
)
def test_a_gpu_that_cannot_multiply_fp8_is_refused(tmp_path, capability, refused):
    found = [
        v
        for v in judged(fp8_base.multiplies, recipe(), tmp_path, capability)
        if v.outcome is Outcome.refuse
    ]
    assert bool(found) == refused
    if refused:
        assert (
            f"compute capability is {capability}: FP8 products begin with 8.9" in found[0].message
        )
        assert found[0].hint.startswith("set train.base_precision: auto, or train.method: qlora")


def test_a_trained_adapter_needs_no_gpu_for_fp8_any_more(tmp_path):
    assert not [
        v
        for v in judged(fp8_base.multiplies, recipe(), tmp_path, 8.0, done=frozenset({"train"}))
        if v.outcome is Outcome.refuse
    ]


def test_serving_other_weights_than_the_trained_ones_is_said(tmp_path):
    said = judged(fp8_base.served, recipe(models=["tuned"]), tmp_path)
    assert [v.outcome for v in said] == [Outcome.warn]
    assert "no adapter on the base in FP8" in said[0].message
    assert (
        said[0].hint == "write quantize: [{ method: fp8, of: base }] and serve.models: [tuned@fp8]"
    )
    right = recipe([{"method": "fp8", "of": "base"}], ["tuned@fp8"])
    assert not [v for v in judged(fp8_base.served, right, tmp_path) if v.outcome is Outcome.warn]


def test_layers_that_only_the_served_base_rounds_are_said(tmp_path):
    some = recipe([{"method": "fp8", "of": "base"}], ["tuned@fp8"], lora={"targets": ["q_proj"]})
    (said,) = judged(fp8_base.served, some, tmp_path)
    assert "training rounds those, the served base rounds all" in said.message


def test_dora_has_no_fp8_base():
    with pytest.raises(ValueError, match=r"lora\.dora is true: DoRA scales whole rows"):
        TrainSection.model_validate({"base_precision": "fp8", "lora": {"dora": True}})


@pytest.mark.parametrize("parallel_word", ["fsdp", "zero2", "zero3"])
def test_other_objectives_than_sft_are_not_shared_out(tmp_path, parallel_word):
    given = recipe(base_precision="auto", objective="dpo", parallel=parallel_word)
    (said,) = judged(parallel.whole_objectives, given, tmp_path, ranks=2)
    assert said.outcome is Outcome.refuse
    assert "'dpo' and train.parallel" in said.message
    assert not [
        v for v in judged(parallel.whole_objectives, given, tmp_path) if v.outcome is Outcome.refuse
    ]


def test_auto_copies_the_model_for_other_objectives_than_sft():
    chosen = choose(TrainSection(objective="orpo", method="full"), 4, None, described(80, 9.0, 4))
    assert chosen is not None
    assert (chosen.parallel, chosen.reason) == (
        "ddp",
        "the trainer of orpo copies the model to each GPU",
    )


def test_halving_is_for_sft_alone():
    with pytest.raises(ValueError, match="on_oom halve_batch is for objective sft"):
        TrainSection.model_validate({"objective": "dpo", "on_oom": "halve_batch"})
