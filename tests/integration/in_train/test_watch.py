"""What a run says of itself while it trains: real steps on a CPU, and a driver that a script plays."""

import gzip
import json
import time
from io import StringIO

import pytest

from toolkit.errors import StepFailedError, UsageError
from toolkit.stages.train import Train
from toolkit.train import sft
from toolkit.train.watch import gpus, watch
from toolkit.train.watch.gpus import Look
from toolkit.train.watch.profile import Recorder
from toolkit.train.watch.window import Window

pytestmark = pytest.mark.integration

PNG = b"\x89PNG"


@pytest.fixture
def busy_gpu(monkeypatch):
    """A driver that shows one busy GPU, beside a run on the CPU, with a peak of 1 TFLOP/s."""
    looks = iter(range(100_000))

    def read() -> Look:
        n = next(looks)
        return Look(90.0 + n % 10, 500.0, 3.6e4 * n)

    def enter(self):
        self._gpus = gpus.Gpus(read, period_s=0.01)
        return self

    def settle(self, position):
        self._kwh = position.energy_kwh = self._gpus.joules / watch.JOULES_OF_KWH

    monkeypatch.setattr(watch, "peaks", lambda formats, _: dict.fromkeys(formats, 1e12))
    monkeypatch.setattr(watch.Watch, "__enter__", enter)
    monkeypatch.setattr(watch.Watch, "settle", settle)


def test_every_logged_step_says_speed_memory_and_time_left(train_config, context, logged):
    ctx = context()
    Train().run(train_config(log_every=2), ctx)
    for name in ("tokens_per_second", "step_s", "memory_gib", "peak_memory_gib", "grad_norm"):
        assert len(logged(ctx.output, name)) == 4
        assert all(value > 0 for value in logged(ctx.output, name))
    left = logged(ctx.output, "eta_s")
    assert left[-1] == 0 < left[0]
    assert not logged(ctx.output, "mfu_percentage")  # a CPU has no peak worth the name
    assert not logged(ctx.output, "gpu_power_usage_watts")


def test_with_a_gpu_mfu_utilisation_power_and_energy_are_there_and_drawn(
    train_config, context, logged, busy_gpu
):
    ctx = context()
    found = Train().run(train_config(), ctx).metrics
    assert 0 < found["mfu_percentage"] < 100
    assert found["gpu_power_usage_watts"] == 500
    assert 90 <= found["gpu_utilization_percentage"] < 100
    assert found["energy_kwh"] > 0
    assert logged(ctx.output, "energy_kwh") == sorted(logged(ctx.output, "energy_kwh"))
    assert len(logged(ctx.output, "mfu_percentage")) == 8
    for name in ("loss.png", "throughput.png", "memory.png", "gpu.png"):
        assert (ctx.output / name).read_bytes().startswith(PNG)


def test_without_a_gpu_nothing_is_drawn_of_one(train_config, context):
    ctx = context()
    Train().run(train_config(max_steps=2), ctx)
    assert not (ctx.output / "gpu.png").exists()
    assert (ctx.output / "memory.png").exists()


def test_the_progress_line_has_the_numbers(train_config, context, busy_gpu):
    events = StringIO()
    Train().run(train_config(max_steps=3), context(events=events))
    lines = [json.loads(line) for line in events.getvalue().splitlines()]
    notes = [line["text"] for line in lines if line["event"] == "note"]
    assert (
        "matrix products reach fp32 1.0 TFLOP/s on this device: MFU is the share of that" in notes
    )
    last = [line for line in lines if line["event"] == "progress"][-1]
    assert (last["done"], last["total"], last["shown"]["eta_s"]) == (3, 3, 0)
    assert list(last["shown"]) == [
        *("loss", "eta_s", "tokens_per_second", "mfu_percentage", "peak_memory_gib"),
        *("gpu_utilization_percentage", "gpu_power_usage_watts", "learning_rate", "grad_norm"),
    ]


def test_steps_are_recorded_and_what_is_trained_is_the_same(train_config, context, tmp_path):
    plain, recorded = context("plain"), context("recorded", profile_steps=(3, 4))
    for ctx in (plain, recorded):
        Train().run(train_config(), ctx)
    weights = "adapter_model.safetensors"
    assert (plain.output / weights).read_bytes() == (recorded.output / weights).read_bytes()
    folder = recorded.output / "profile"
    assert {p.name for p in folder.iterdir()} == {"steps-3-4.json.gz", "steps-3-4.txt"}
    trace = json.loads(gzip.decompress((folder / "steps-3-4.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step 3", "step 4", "aten::mm"} <= names
    assert not {"step 2", "step 5"} & names
    table = (folder / "steps-3-4.txt").read_text()
    assert table.startswith("Steps 3:4 of rank 0; the 20 operators that took most by themselves.")
    assert "Self CPU %" in table
    assert "aten::mm" in table
    assert "step 3" not in table
    assert not (plain.output / "profile").exists()


def test_a_window_beyond_the_last_step_ends_the_run_before_the_model_is_loaded(
    train_config, context, monkeypatch
):
    monkeypatch.setattr(sft, "build_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UsageError, match="--profile-steps is 7:9, but the last step is 8"):
        Train().run(train_config(), context(profile_steps=(7, 9)))


def test_a_profile_outlives_an_interruption(train_config, context, monkeypatch):
    """Recorded before a crash, it is in the artifact that the resumed run makes."""
    config = train_config(checkpoint_every=4)
    heldout = sft.heldout_loss
    monkeypatch.setattr(sft, "heldout_loss", _refuse)
    first = context("first", profile_steps=(2, 3))
    with pytest.raises(StepFailedError):
        Train().run(config, first)
    assert (first.state / "profile" / "steps-2-3.txt").is_file()
    monkeypatch.setattr(sft, "heldout_loss", heldout)
    events = StringIO()
    again = context("again", profile_steps=(2, 3), state=first.state, events=events)
    Train().run(config, again)
    assert (again.output / "profile" / "steps-2-3.json.gz").is_file()
    assert "--profile-steps 2:3 was over before step 5: nothing to record" in events.getvalue()


def _refuse(*_):
    raise StepFailedError("cut off")


def test_a_run_that_fails_within_the_window_leaves_no_half_profile(
    train_config, context, monkeypatch
):
    monkeypatch.setattr(sft, "heldout_loss", _refuse)
    ctx = context(profile_steps=(1, 8))
    with pytest.raises(StepFailedError):
        Train().run(train_config(evaluate_every=2), ctx)
    assert not (ctx.state / "profile").exists()
    monkeypatch.undo()
    monkeypatch.setattr(sft, "collate", _refuse)  # in the middle of a step
    with pytest.raises(StepFailedError):
        Train().run(train_config(), context("middle", profile_steps=(1, 8)))
    monkeypatch.undo()
    after = context("after", profile_steps=(1, 1))  # the profiler is free again
    Train().run(train_config(max_steps=1), after)
    assert (after.output / "profile" / "steps-1-1.txt").is_file()


def test_a_resumed_run_records_the_steps_that_are_left(context):
    events = StringIO()
    recorder = Recorder(Window(3, 6), 4, context(events=events))
    assert recorder.window == (5, 6)
    assert "going on after step 4: steps 5:6 are recorded" in events.getvalue()


def test_watching_a_step_takes_less_than_a_thousandth_of_a_small_one(context):
    """Far below 2 % of a step of a tenth of a second; the least of many, so that a busy machine may be slow."""
    import numpy as np

    from toolkit.train.checkpoint import Position
    from toolkit.train.parallel.ranks import Ranks

    lengths, taken = np.full(40, 400), []
    seen = watch.Watch(watch.Limit(), Ranks(), context(), Position(), 2000)
    with seen:
        for step in range(1, 300):
            began = time.perf_counter()
            seen.begin(step)
            seen.end(step, 0.1, 16_000, lengths, 9000)
            seen.numbers()
            seen.shown()
            taken.append(time.perf_counter() - began)
    assert min(taken) < 1e-3
