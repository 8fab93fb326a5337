"""What a recipe may say about objectives, and what is refused before anything starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from toolkit.errors import NotInstalledError
from toolkit.plan import Observed, make_plan
from toolkit.preflight import Outcome, check, gather
from toolkit.recipe.load import Loaded
from toolkit.recipe.objectives import GrpoSection
from toolkit.recipe.recipe import Recipe
from toolkit.recipe.train import TrainSection
from toolkit.survey import StepStatus
from toolkit.train import vllm_rollout
from toolkit.train.objectives import OBJECTIVES
from toolkit.train.rollout import choose_rollout

REWARDS = {"rewards": ["rewards.py:short"], "group_size": 4}

SHORT = REWARDS | {"max_completion_tokens": 16}


def section(**values):
    return TrainSection.model_validate(values)


def recipe(train, data=None, max_length=64):
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"source": "./model", "max_length": max_length},
            "data": {"sources": [{"path": "a.jsonl"} | (data or {})]},
            "train": train,
        }
    )


def test_every_objective_has_a_loop():
    named = TrainSection.model_fields["objective"].annotation.__args__
    assert set(OBJECTIVES) == set(named)


def test_without_an_objective_answers_are_learned():
    assert section().objective == "sft"
    assert recipe({}).objective == "sft"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"objective": "grpo"}, "needs grpo.rewards: at least one 'file.py:function'"),
        ({"objective": "grpo", "grpo": {"rewards": []}}, "at least 1 item"),
        ({"objective": "grpo", "grpo": {"rewards": ["short"]}}, "write 'file.py:function'"),
        (
            {"objective": "grpo", "grpo": {"rewards": ["a.py:b", "a.py:b"]}},
            "names a function twice",
        ),
        (
            {"objective": "grpo", "grpo": REWARDS | {"weights": [1, 2]}},
            "weights has 2 numbers for 1 rewards",
        ),
        (
            {"objective": "grpo", "grpo": REWARDS, "batch_size": 6},
            "= 6 answers, which grpo.group_size 4 does not divide",
        ),
        ({"objective": "dpo", "kto": {}}, "kto is set, but objective is 'dpo'"),
        ({"dpo": {"beta": 0.2}}, "dpo is set, but objective is 'sft'"),
        ({"objective": "kto", "batch_size": 1}, "batch_size is at least 2"),
        ({"objective": "dpo", "dpo": {"label_smoothing": 0.1}}, "read by loss 'robust' alone"),
    ],
)
def test_nonsense_is_refused(values, says):
    with pytest.raises(ValidationError, match=says):
        section(**values)


def test_kto_without_its_kl_may_have_one_row_in_a_batch():
    assert section(objective="kto", batch_size=1, kto={"loss": "apo_zero_unpaired"}).batch_size == 1


def test_a_format_of_another_objective_is_refused():
    with pytest.raises(ValidationError, match=r"is not for train\.objective 'dpo'"):
        recipe({"objective": "dpo"}, {"format": "messages"})
    with pytest.raises(ValidationError, match=r"'preference' is not for train\.objective 'sft'"):
        recipe({}, {"format": "preference"})


def test_an_answer_that_fills_everything_leaves_no_room():
    with pytest.raises(ValidationError, match="leaves no room for a question"):
        recipe({"objective": "grpo", "grpo": REWARDS}, max_length=256)


def test_the_plan_tells_the_data_step_what_rows_are_for():
    made = recipe({"objective": "grpo", "grpo": SHORT})
    files = {"./model": "0" * 64, "a.jsonl": "1" * 64, "rewards.py": "2" * 64}
    plan = make_plan(Loaded(made, Path("x.yaml")), Observed(files, {}))
    assert plan.step("data").config["objective"] == "grpo"
    assert plan.step("data").config["answer_tokens"] == 16
    assert plan.step("train").config["digests"] == {"rewards.py": "2" * 64}


def test_the_plan_counts_the_rows_of_a_data_step_that_is_done():
    from toolkit.cli.plan import _counted

    numbers = {"rows_train": 40.0, "rows_heldout": 8.0, "rows_too_long": 2.0, "rows_invalid": 0.0}
    step, made = SimpleNamespace(stage="data"), SimpleNamespace(metrics=numbers)
    assert _counted(StepStatus(step, made, "done")) == (
        "data: 40 rows to train, 8 held out, 2 too long"
    )
    assert _counted(StepStatus(step, None, "new")) is None


def test_another_reward_is_another_training():
    made = recipe({"objective": "grpo", "grpo": SHORT})

    def fingerprint(digest):
        files = {"./model": "0" * 64, "a.jsonl": "1" * 64, "rewards.py": digest}
        return (
            make_plan(Loaded(made, Path("x.yaml")), Observed(files, {})).step("train").fingerprint
        )

    assert fingerprint("2" * 64) != fingerprint("3" * 64)


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("def short(completions): ...", None),
        ("def short(prompts, completions, **columns): ...", None),
        ("def short(completions, colour): ...", None),
        ("def short(texts): ...", "short() does not take the answers"),
        ("def long(completions): ...", "rewards.py defines no function 'short'"),
        ("def short(:", "rewards.py is not Python"),
    ],
)
def test_preflight_looks_at_rewards_without_running_them(tmp_path, code, refused):
    (tmp_path / "rewards.py").write_text(code)
    made = recipe({"objective": "grpo", "grpo": SHORT})
    verdicts = check(made, gather(made, tmp_path, accelerator="cpu"))
    found = [v.message for v in verdicts if v.outcome is Outcome.refuse and "rewards" in v.message]
    assert len(found) == (refused is not None)
    assert all(m.startswith(f"train.grpo.rewards.0: {refused}") for m in found)


def test_the_files_of_rewards_are_named_once():
    grpo = GrpoSection(rewards=("a.py:x", "b/c.py:y", "a.py:z"))
    assert grpo.files == ("a.py", "b/c.py")


def grpo(rollout, **changes):
    return section(objective="grpo", grpo=SHORT | {"rollout": rollout}, **changes)


def test_rollouts_are_vllms_where_it_can_and_the_models_own_elsewhere():
    assert choose_rollout(grpo("auto"), "cuda", "0.26.0").vllm
    assert choose_rollout(grpo("vllm"), "cuda", "0.31.1+cu130").vllm
    assert not choose_rollout(grpo("transformers"), "cuda", "0.26.0").vllm
    assert "loads the adapter" in str(choose_rollout(grpo("auto"), "cuda", "0.26.0"))
    summed = choose_rollout(grpo("auto", lora={"init": "pissa"}), "cuda", "0.26.0")
    assert summed.vllm
    assert "is sent all weights" in str(summed)
    for device, installed, changes, why in (
        ("cpu", "0.26.0", {}, "no GPU"),
        ("cuda", None, {}, "not in the training environment"),
        ("cuda", "0.32.0", {}, "TRL supports vLLM 0.22 to 0.31, and 0.32.0 is installed"),
        ("cuda", "0.9.1", {}, "0.9.1 is installed"),
        ("cuda", "0.26.0", {"method": "qlora"}, "in 4 bit"),
    ):
        found = choose_rollout(grpo("auto", **changes), device, installed)
        assert not found.vllm
        assert why in str(found)
        with pytest.raises(NotInstalledError, match=why) as raised:
            choose_rollout(grpo("vllm", **changes), device, installed)
        assert "rollout: transformers" in raised.value.hint


@pytest.mark.parametrize(
    ("installed", "environ", "wanted"),
    [(None, {}, "0"), (None, {"VLLM_USE_FLASHINFER_SAMPLER": "1"}, "1"), (True, {}, None)],
)
def test_vllm_samples_without_flashinfer_where_that_is_not_installed(
    monkeypatch, installed, environ, wanted
):
    """It would import FlashInfer unasked: ModuleNotFoundError after a minute of loading, on a real H200."""
    monkeypatch.setattr(vllm_rollout, "find_spec", lambda name: installed)
    vllm_rollout.prepare(environ)
    assert environ.get("VLLM_USE_FLASHINFER_SAMPLER") == wanted
