"""Interrupted and resumed equals uninterrupted: loss by loss, and in every byte of the weights."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.errors import ArtifactError, StepFailedError
from toolkit.stages import StageContext
from toolkit.stages.train import Train, TrainConfig
from toolkit.train import checkpoint

pytestmark = pytest.mark.integration
WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}


class Interrupted(StageContext):
    """A context in which something happens when step 5 is logged."""

    def log(self, step, **metrics):
        super().log(step, **metrics)
        if step == 5 and "loss" in metrics:
            self.happen()

    def happen(self):
        os.kill(os.getpid(), signal.SIGTERM)


class Killed(Interrupted):
    def happen(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Crashed(Interrupted):
    def happen(self):
        raise MemoryError


def copy_of(ctx: StageContext, kind: type[StageContext]) -> StageContext:
    return kind(ctx.inputs, ctx.output, ctx.state, ctx.recipe_dir)


def run_until_killed(config: TrainConfig, ctx: StageContext) -> None:
    """Run in a process of its own, which SIGKILL ends after the fifth step."""
    code = (
        "import sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path.cwd())!r}]\n"
        "from pathlib import Path\n"
        "from test_resume import Killed\n"
        "from toolkit.stages import Input, Kind\n"
        "from toolkit.stages.train import Train, TrainConfig\n"
        "config, model, dataset, output, state = sys.argv[1:]\n"
        "named = {'source': 'tests/small-llama'}\n"
        "inputs = {'model': Input(Path(model), Kind.model, 'b' * 64, named),\n"
        "          'dataset': Input(Path(dataset), Kind.dataset, 'd' * 64, {})}\n"
        "context = Killed(inputs, Path(output), Path(state), Path(state))\n"
        "Train().run(TrainConfig.model_validate_json(config), context)\n"
    )
    arguments = [ctx.inputs["model"].path, ctx.inputs["dataset"].path, ctx.output, ctx.state]
    ended = subprocess.run(
        [sys.executable, "-c", code, config.model_dump_json(), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def run_until_crashed(config: TrainConfig, ctx: StageContext) -> None:
    with pytest.raises(MemoryError):
        Train().run(config, copy_of(ctx, Crashed))


@pytest.mark.parametrize(
    ("interrupt", "changes"),
    [
        (run_until_killed, {"lora": {"rank": 8, "dropout": 0.2}}),
        (run_until_crashed, {"method": "full", "learning_rate": 1e-3}),
        (run_until_crashed, {"packing": False, "gradient_accumulation": 2}),
        (run_until_crashed, {"optimizer": "adamw_8bit"}),
        (run_until_crashed, {"method": "qlora"}),
    ],
    ids=["killed", "full", "unpacked", "adamw_8bit", "qlora"],
)
def test_interrupted_after_step_5_and_resumed_is_the_same_run(
    interrupt, changes, train_config, context, logged
):
    config = train_config(checkpoint_every=2, evaluate_every=3, **changes)
    whole = context("whole")
    expected = Train().run(config, whole)

    interrupt(config, context("killed"))
    first = whole.output.parent.parent / "killed"
    (first / "output").rename(first / "lost")  # the worker hands every try an empty folder
    resumed = context("killed")
    result = Train().run(config, resumed)

    for key in ("loss", "heldout_loss", "grad_norm", "learning_rate", "trained_tokens"):
        assert logged(resumed.output, key) == logged(whole.output, key), key
    assert len(logged(resumed.output, "loss")) == 8
    weights = WEIGHTS.get(config.train.method, WEIGHTS["lora"])
    assert (resumed.output / weights).read_bytes() == (whole.output / weights).read_bytes()
    assert result.facts["row_order"] == expected.facts["row_order"]
    assert result.metrics["rows_seen"] == expected.metrics["rows_seen"]
    assert [p.name for p in sorted((resumed.state / "checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000006",
    ]


def test_sigterm_finishes_the_step_keeps_a_checkpoint_and_says_so(train_config, context, logged):
    config = train_config()
    whole = context("whole")
    Train().run(config, whole)
    before = signal.getsignal(signal.SIGTERM)
    stopped = context("stopped")
    with pytest.raises(StepFailedError, match="after step 5 of 8") as caught:
        Train().run(config, copy_of(stopped, Interrupted))
    assert "run the same command again" in str(caught.value)
    assert signal.getsignal(signal.SIGTERM) is before
    (stopped.output).rename(stopped.output.parent / "lost")
    again = context("stopped")
    Train().run(config, again)
    assert logged(again.output, "loss") == logged(whole.output, "loss")


def stop_at_five(config, context):
    ctx = context("stopped")
    with pytest.raises(StepFailedError):
        Train().run(config, copy_of(ctx, Interrupted))
    ctx.output.rename(ctx.output.parent / "lost")
    return context("stopped")


def test_without_resume_a_run_starts_anew(train_config, context, logged):
    import dataclasses

    ctx = dataclasses.replace(stop_at_five(train_config(), context), resume=False)
    Train().run(train_config(), ctx)
    assert len(logged(ctx.output, "loss")) == 8
    assert checkpoint.newest(ctx.state / "checkpoints") is None


def test_a_checkpoint_of_other_rows_is_refused(train_config, context):
    ctx = stop_at_five(train_config(), context)
    other = train_config().model_copy(update={"seed": 4})
    with pytest.raises(ArtifactError, match="saw other rows"):
        Train().run(other, ctx)


def test_a_damaged_checkpoint_is_named(train_config, context):
    ctx = stop_at_five(train_config(), context)
    found = checkpoint.newest(ctx.state / "checkpoints")
    (found / "weights-00-000.safetensors").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="step-00000005 cannot be used"):
        Train().run(train_config(), ctx)


def test_a_checkpoint_of_another_rank_is_refused(train_config, context):
    ctx = stop_at_five(train_config(), context)
    with pytest.raises(ArtifactError, match=r"has shape \(8, 64\) there, \(4, 64\) in the model"):
        Train().run(train_config(lora={"rank": 4}), ctx)


def test_half_a_checkpoint_is_not_used(train_config, context):
    ctx = stop_at_five(train_config(), context)
    folder = ctx.state / "checkpoints"
    (folder / "step-00000007.part").mkdir()
    assert checkpoint.newest(folder).name == "step-00000005"
