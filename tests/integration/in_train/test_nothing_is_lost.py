"""Numbers that are none, full disks, damaged checkpoints: an error that says it, and what was good stays."""

import math
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_objectives import steps, talker  # noqa: F401 - fixtures
from test_resume import copy_of, run_until_crashed

from toolkit.errors import ArtifactError, StepFailedError
from toolkit.stages import StageContext
from toolkit.stages.train import Train

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("default")]


def empty(folder: Path) -> None:
    """As the worker hands every try its output."""
    shutil.rmtree(folder)
    folder.mkdir()


# --- not a number ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_that_are_no_numbers_after_the_last_step_are_no_artifact(
    method, train_config, context
):
    config = train_config(
        method=method, learning_rate=1e38, max_steps=1, warmup=0, schedule="constant"
    )
    ctx = context()
    with pytest.raises(StepFailedError, match=r"nan|NaN") as raised:
        Train().run(config, ctx)
    assert "lower train.learning_rate" in raised.value.hint
    assert not list(ctx.output.glob("*.safetensors"))


def test_weights_that_are_no_numbers_are_counted_and_named():
    from toolkit.train.finite import insist_on_numbers

    insist_on_numbers({"a": True, "b": True})
    with pytest.raises(StepFailedError, match=r"1 of 2 trained weights hold NaN.*, e\.g\. b"):
        insist_on_numbers({"a": True, "b": False})


@pytest.fixture
def broken_gradient(monkeypatch):
    """Gradients of a DPO step become NaN while its loss is fine."""
    import trl

    compute = trl.DPOTrainer.training_step

    def of(step):
        def training_step(self, model, *args, **kwargs):
            loss = compute(self, model, *args, **kwargs)
            if self.state.global_step + 1 == step:
                next(w.grad for w in model.parameters() if w.grad is not None).fill_(math.nan)
            return loss

        monkeypatch.setattr(trl.DPOTrainer, "training_step", training_step)

    return of


@pytest.mark.parametrize("step", [4, 8])
def test_no_checkpoint_and_no_artifact_sees_a_gradient_that_is_no_number(
    steps,  # noqa: F811
    broken_gradient,
    step,
):
    broken_gradient(step)
    dataset, _ = steps.data("dpo", heldout={"fraction": 0})
    with pytest.raises(StepFailedError, match=f"the gradient norm is nan at step {step}\n"):
        steps.train("dpo", dataset, checkpoint_every=2, log_every=3)
    run = steps.root / "train"
    assert not (run / "output" / "adapter_model.safetensors").exists()
    broken_gradient(0)  # another seed of dropout, a mended driver: the checkpoint was good
    _, result = steps.train("dpo", dataset, checkpoint_every=2, log_every=3)
    assert result.metrics["steps"] == 8


def test_a_heldout_loss_that_is_no_number_names_the_heldout_rows(steps, monkeypatch):  # noqa: F811
    import trl

    compute = trl.DPOTrainer.compute_loss

    def only_held_out(self, model, inputs, *args, **kwargs):
        found = compute(self, model, inputs, *args, **kwargs)
        if model.training:
            return found
        return (found[0] * math.nan, *found[1:]) if isinstance(found, tuple) else found * math.nan

    monkeypatch.setattr(trl.DPOTrainer, "compute_loss", only_held_out)
    dataset, _ = steps.data("dpo")
    with pytest.raises(
        StepFailedError,
        match=r"held-out loss is nan after step 2, in rows 0, .* of heldout\.jsonl",
    ):
        steps.train("dpo", dataset, max_steps=2)


# --- a disk that is full --------------------------------------------------------------------------


class FullAtStep5(StageContext):
    """From step 5 on no file can grow beyond 60 kB: what writing says is what a full disk says."""

    def log(self, step, **metrics):
        super().log(step, **metrics)
        if step == 5:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))


@pytest.fixture
def room_again():
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize(("objective", "kept"), [("sft", "step-00000004"), ("dpo", "checkpoint-4")])
def test_a_full_disk_says_what_is_kept_and_the_run_goes_on_from_it(
    steps,  # noqa: F811
    logged,
    room_again,
    objective,
    kept,
):
    dataset, _ = steps.data("dpo")
    whole, _ = steps.train(objective, dataset, name="whole", checkpoint_every=2)
    with pytest.raises(StepFailedError, match="checkpoint of step 6 cannot be written") as raised:
        steps.train(objective, dataset, kind=FullAtStep5, checkpoint_every=2)
    assert "\n" not in raised.value.message
    assert f"it goes on from {kept}, which is complete" in raised.value.hint
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    parts, _ = steps.train(objective, dataset, checkpoint_every=2)
    assert logged(parts.output, "loss") == logged(whole.output, "loss")


def test_an_error_of_torch_that_is_not_about_files_stays_what_it_is(tmp_path):
    from toolkit.train.checkpoint_files import writing

    with pytest.raises(RuntimeError, match="NCCL"), writing(tmp_path, 3, None):
        raise RuntimeError("NCCL error")
    said = "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file 1"
    with (
        pytest.raises(StepFailedError, match="cannot be written") as raised,
        writing(tmp_path, 3, None),
    ):
        raise RuntimeError(said)
    assert "goes on from the start" in raised.value.hint


# --- damaged checkpoints --------------------------------------------------------------------------


def gone(file: Path) -> None:
    file.unlink()


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def noise(file: Path) -> None:
    file.write_bytes(b"[" * file.stat().st_size)


DAMAGES = [
    ("optimizer-00-000.safetensors", gone, "is not there"),
    ("numbers.json", cut_off, "bytes and was written with"),
    ("random-00.pt", noise, ""),
    ("metrics.jsonl", noise, ""),
]


@pytest.mark.parametrize("case", DAMAGES, ids=lambda case: f"{case[0]}-{case[1].__name__}")
def test_a_damaged_file_of_a_checkpoint_is_an_error_with_a_way_out(
    case, train_config, context, monkeypatch
):
    file, damage, says = case
    config, ctx = train_config(checkpoint_every=2, max_steps=6), context()
    run_until_crashed(config, ctx)
    newest = ctx.state / "checkpoints" / "step-00000004"
    damage(newest / file)
    empty(ctx.output)
    if damage is not noise:  # seen before a GPU is needed
        monkeypatch.setattr("toolkit.train.sft.build_model", None)
    with pytest.raises(ArtifactError, match=f"step-00000004 cannot be used: .*{says}") as raised:
        Train().run(config, copy_of(ctx, StageContext))
    assert "go on from an older checkpoint" in raised.value.hint
    monkeypatch.undo()
    shutil.rmtree(newest)  # what the hint says
    empty(ctx.output)
    assert Train().run(config, copy_of(ctx, StageContext)).metrics["steps"] == 6


class Stopped(StageContext):
    """SIGTERM when step 5 is logged."""

    def log(self, step, **metrics):
        super().log(step, **metrics)
        if step == 5 and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_damaged_file_of_a_trainers_checkpoint_is_an_error_too(steps):  # noqa: F811
    dataset, _ = steps.data("dpo")
    with pytest.raises(StepFailedError, match="SIGTERM"):
        steps.train("dpo", dataset, kind=Stopped, checkpoint_every=2)
    state = steps.root / "train" / "state"
    shutil.copytree(state, good := steps.root / "good")
    for file, damage, says in [
        ("scheduler.pt", gone, "scheduler.pt is not there"),
        ("optimizer.pt", cut_off, "optimizer.pt has"),
        ("rng_state.pth", noise, ""),
        ("trainer_state.json", gone, "trainer_state.json is not there"),
        ("toolkit.json", cut_off, ""),
        ("toolkit.json", noise, ""),
    ]:
        shutil.rmtree(state)
        shutil.copytree(good, state)
        damage(state / "trl" / "checkpoint-6" / file)
        with pytest.raises(ArtifactError, match=f"checkpoint-6 cannot be used: .*{says}"):
            steps.train("dpo", dataset, checkpoint_every=2)


def test_a_file_that_came_later_is_no_damage(tmp_path):
    from toolkit.train.checkpoint_files import insist_on, sizes

    torch.save({}, tmp_path / "a.pt")
    known = sizes(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    insist_on(tmp_path, known)
