"""What a run says of its speed, memory and power; which steps may be recorded."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.errors import UsageError
from toolkit.forecast.shape import ModelShape
from toolkit.stages import StageContext
from toolkit.tracking.uploads import PROFILE_LIMIT, small_files
from toolkit.train.checkpoint import Position
from toolkit.train.parallel.ranks import Ranks
from toolkit.train.watch import gpus, peak, plots, watch
from toolkit.train.watch.flops import Work, windows
from toolkit.train.watch.gpus import Gpus, Look
from toolkit.train.watch.watch import Limit, Taken, Watch
from toolkit.train.watch.window import Window, insist

# --- useful work ----------------------------------------------------------------------------------

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LINEARS = {
    "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
}  # fmt: skip
LLAMA_8B = ModelShape(32, 4096, 14336, 8, 128, 128256, LINEARS, heads=32)
ROW = np.array([4096])


def work(targets: tuple[str, ...] = ALL, *, fp8: bool = False, **settings: Any) -> Work:
    return Work.of_run(LLAMA_8B, settings, targets=targets, rank=16, fp8=fp8, other="bf16")


def test_lora_takes_four_operations_for_every_weight_of_the_frozen_base():
    blocks = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    head, thin = 4096 * 128256, 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    attention = 32 * 12 * 4096 * (4096 * 4097 // 2)
    found = work().of(ROW, 4096)
    assert found == {"bf16": 4096 * (4 * blocks + 4 * head + 6 * thin) + attention}
    without_attention = found["bf16"] - attention
    assert without_attention / (4 * 8.03e9 * 4096) == pytest.approx(0.943, abs=0.001)  # no look-ups


def test_all_weights_take_six():
    lora, full = work(()).of(ROW, 4096)["bf16"], work().of(ROW, 4096)["bf16"]
    assert lora / full == pytest.approx(1.45, abs=0.02)
    assert work(()).token == 6 * 32 * LLAMA_8B.block_weights


def test_the_head_counts_for_trained_tokens_alone():
    head = 4 * 4096 * 128256
    assert work().of(ROW, 4096)["bf16"] - work().of(ROW, 1000)["bf16"] == 3096 * head


def test_rows_that_are_packed_do_not_attend_to_each_other():
    pairs = 4096 * 4097 // 2 - 4 * (1024 * 1025 // 2)
    apart = work().of(np.array([1024] * 4), 4096)
    assert work().of(ROW, 4096)["bf16"] - apart["bf16"] == 32 * 12 * 4096 * pairs


def test_an_fp8_base_does_only_its_frozen_products_in_fp8():
    bf16, fp8 = work().of(ROW, 4096), work(fp8=True).of(ROW, 4096)
    assert sum(fp8.values()) == bf16["bf16"]
    assert fp8["fp8"] == 4096 * 4 * LLAMA_8B.linear_weights
    some = work(("q_proj", "v_proj"), fp8=True)
    assert some.fp8 == 4 * 32 * (4096 + 1024) * 4096
    assert some.formats == ("fp8", "bf16")


def test_a_sliding_window_leaves_out_what_lies_behind_it():
    assert work(sliding_window=1024).windows == {1024: 32}
    assert work(sliding_window=1024, use_sliding_window=False).windows == {None: 32}
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    assert windows({"sliding_window": 512, "layer_types": kinds}, 6) == {512: 5, None: 1}
    assert windows({"text_config": {"sliding_window": 512, "layer_types": kinds}}, 6)[512] == 5
    narrow, wide = work(sliding_window=2).of(np.array([5]), 0), work().of(np.array([5]), 0)
    assert wide["bf16"] - narrow["bf16"] == 32 * 12 * 4096 * (15 - 9)


# --- the peak -------------------------------------------------------------------------------------


def test_a_cpu_has_no_peak():
    assert peak.peaks(["bf16"], "cpu") == {}


def test_the_peak_is_measured_once_and_kept(tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(peak, "cached", lambda each: tmp_path / "matmul-peaks" / f"{each}.json")
    monkeypatch.setattr(peak, "measured", lambda each: asked.append(each) or 8e14)
    for _ in range(2):
        assert peak.peaks(["fp8", "bf16"], "cuda") == {"fp8": 8e14, "bf16": 8e14}
    assert asked == ["fp8", "bf16"]
    assert json.loads((tmp_path / "matmul-peaks" / "bf16.json").read_text())["matrix"] == 8192
    assert [path.suffix for path in (tmp_path / "matmul-peaks").iterdir()] == [".json"] * 2


def test_a_damaged_file_is_measured_anew_and_a_full_gpu_has_no_peak(tmp_path, monkeypatch):
    file = tmp_path / "bf16.json"
    file.write_text("{")
    monkeypatch.setattr(peak, "cached", lambda _: file)
    monkeypatch.setattr(peak, "measured", lambda _: 5e14)
    assert peak.peaks(["bf16"], "cuda") == {"bf16": 5e14}

    def full(_: str) -> float:
        raise RuntimeError("CUDA out of memory")

    file.unlink()
    monkeypatch.setattr(peak, "measured", full)
    assert peak.peaks(["bf16"], "cuda") == {}


def test_products_take_turns_and_at_least_two_are_timed():
    called: list[int] = []
    turns = [lambda n=n: called.append(n) for n in range(3)]
    assert len(peak.timed(turns, 30, 0.0, lambda: None)) == 2
    assert called == [0, 1, 2, 0, 1]
    assert len(peak.timed(turns, 4, 60.0, lambda: None)) == 4


# --- what the driver says -------------------------------------------------------------------------


def looked(looks: list[Look | None], count: int) -> Gpus:
    """After ``count`` looks, the last of which is repeated."""
    left = list(looks)
    found = Gpus(lambda: left.pop(0) if len(left) > 1 else left[0], period_s=0.001)
    end = time.monotonic() + 20
    while len(left) > 1 and time.monotonic() < end:
        time.sleep(0.002)
    assert len(left) <= max(1, len(looks) - count)
    return found


def test_utilisation_and_power_are_means_since_they_were_last_asked_for():
    seen = looked([Look(100, 700), Look(50, 500), Look(0, 300)], 2)
    seen.stop()
    found = seen.take()
    assert 0 < found["gpu_utilization_percentage"] < 75
    assert 300 < found["gpu_power_usage_watts"] < 600
    assert seen.take() == {"gpu_utilization_percentage": 0, "gpu_power_usage_watts": 300}
    assert seen.last == Look(0, 300)


def test_energy_is_the_counter_of_the_driver():
    seen = looked([Look(9, 500, 1000.0), Look(9, 500, 1600.0), Look(9, 500, 2500.0)], 2)
    seen.stop()
    assert seen.joules == 1500.0


def test_without_a_counter_energy_is_power_times_time():
    assert gpus._between(Look(9, 400), Look(9, 600), 2.0) == 1000.0
    assert gpus._between(Look(9), Look(9), 2.0) == 0.0


def test_what_a_card_does_not_tell_is_left_out():
    seen = looked([Look(90, None)], 1)
    seen.stop()
    assert seen.take() == {"gpu_utilization_percentage": 90}
    silent = Gpus(lambda: None)
    silent.stop()
    assert (silent.take(), silent.joules, silent.last) == ({}, 0.0, Look())


@pytest.mark.parametrize(
    ("text", "look"),
    [
        ("98, 612.40\n", Look(98.0, 612.4)),
        ("98, 612\n96, 600\n", Look(97.0, 1212.0)),
        ("[N/A], 612\n", Look(None, 612.0)),
        ("98, [Not Supported]\n97, 600\n", Look(97.5, None)),
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_the_answer_of_nvidia_smi_is_read(text, look):
    assert gpus.parse(text) == look


def test_nvidia_smi_is_asked_for_the_gpus_that_train(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "91, 650.5"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpus.smi(["GPU-a", "GPU-b"])() == Look(91.0, 650.5)
    assert "--id=GPU-a,GPU-b" in (tmp_path / "asked").read_text()
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpus.smi(["GPU-a"])() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert gpus.smi(["GPU-a"])() is None


class NvmlError(Exception):
    pass


def driver(monkeypatch, **answers: Any) -> None:
    """A module that stands for ``nvidia-ml-py``."""
    made = types.ModuleType("pynvml")
    made.__spec__ = types.SimpleNamespace()
    made.NVMLError = NvmlError
    made.nvmlInit = lambda: None
    made.nvmlDeviceGetHandleByUUID = lambda name: name
    made.nvmlDeviceGetUtilizationRates = lambda _: types.SimpleNamespace(gpu=97)
    made.nvmlDeviceGetPowerUsage = lambda _: 640_000
    made.nvmlDeviceGetTotalEnergyConsumption = lambda _: 5_000_000
    for name, answer in answers.items():
        setattr(made, name, answer)
    monkeypatch.setitem(sys.modules, "pynvml", made)


def refuse(*_: Any) -> Any:
    raise NvmlError("not supported")


def test_nvml_adds_power_and_energy_up_over_gpus(monkeypatch):
    driver(monkeypatch)
    read = gpus.nvml(["GPU-a", "GPU-b"])
    assert read is not None
    assert read() == Look(97.0, 1280.0, 10_000.0)


def test_nvml_without_some_answers_gives_the_others(monkeypatch):
    driver(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=refuse)
    read = gpus.nvml(["GPU-a"])
    assert read is not None
    assert read() == Look(97.0, 640.0, None)


@pytest.mark.parametrize("name", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_where_nvml_finds_no_gpu_nvidia_smi_is_asked(monkeypatch, name):
    driver(monkeypatch, **{name: refuse})
    assert gpus.nvml(["GPU-a"]) is None


# --- numbers of a run -----------------------------------------------------------------------------


@pytest.fixture
def ctx(tmp_path) -> StageContext:
    for name in ("output", "state"):
        (tmp_path / name).mkdir()
    return StageContext({}, tmp_path / "output", tmp_path / "state", tmp_path)


LIMIT = Limit(work(), {"bf16": 8e14})


def watching(ctx: StageContext, total: int = 10, limit: Limit = LIMIT, **done: Any) -> Watch:
    return Watch(limit, Ranks(), ctx, Position(**done), total)


def test_metrics_are_means_over_the_steps_since_the_last_ones(ctx):
    with watching(ctx) as seen:
        for step, seconds in enumerate((1.0, 0.5), start=1):
            seen.end(step, seconds, 4096, ROW, 4096)
        found = seen.numbers()
        assert found["tokens_per_second"] == pytest.approx(8192 / 1.5)
        assert found["step_s"] == 0.75
        flop = work().of(ROW, 4096)["bf16"]
        assert found["mfu_percentage"] == pytest.approx(100 * 2 * flop / 8e14 / 1.5)
        assert found["peak_memory_gib"] >= found["memory_gib"] > 0.01
        seen.end(3, 0.25, 4096, ROW, 4096)
        assert seen.numbers()["tokens_per_second"] == 4096 * 4


def test_mfu_is_of_the_peaks_of_all_devices_and_formats(ctx):
    mixed = Limit(work(fp8=True), {"bf16": 8e14, "fp8": 16e14}, ranks=2)
    flop = work(fp8=True).of(ROW, 4096)
    assert mixed.ideal_s(ROW, 4096) == (flop["fp8"] / 16e14 + flop["bf16"] / 8e14) / 2
    with watching(ctx, limit=Limit()) as seen:
        seen.end(1, 1.0, 4096, ROW, 4096)
        assert "mfu_percentage" not in seen.numbers() | seen.shown() | seen.summary()


def test_the_time_left_forgets_the_first_step_which_compiles(ctx):
    with watching(ctx, total=100) as seen:
        seen.end(1, 60.0, 4096)
        assert seen.left_s == 60 * 99
        for step in range(2, 12):
            seen.end(step, 0.5, 4096)
        assert seen.left_s == 0.5 * 89
        assert seen.shown()["tokens_per_second"] == 8192


def test_a_resumed_run_has_the_steps_left_and_the_energy_so_far(ctx):
    with watching(ctx, step=90, energy_kwh=1.5, total=100) as seen:
        seen.end(91, 2.0, 4096)
        assert seen.left_s == 18.0
        seen._gpus = looked([Look(98, 640, 0.0), Look(98, 640, 3.6e6)], 1)
        seen._ctx = types.SimpleNamespace(device="cuda")
        monkey = Position()
        seen._gpus.stop()
        seen.settle(monkey)
        assert monkey.energy_kwh == 2.5
        assert seen.summary()["energy_kwh"] == 2.5


def test_a_run_that_ends_in_its_first_step_has_numbers_too(ctx):
    with watching(ctx, total=1) as seen:
        assert (seen.numbers()["step_s"], seen.summary()) == (0.0, {})
        seen.end(1, 2.0, 4096, ROW, 4096)
        assert seen.shown()["eta_s"] == 0
        assert seen.summary()["mfu_percentage"] > 0


def test_steps_add_up():
    assert Taken(1, 2.0, 3, 4.0) + Taken(1, 1.0, 1, 1.0) == Taken(2, 3.0, 4, 5.0)


def test_ranks_that_do_not_speak_measure_nothing(ctx, monkeypatch):
    monkeypatch.setattr(watch, "peaks", lambda *_: pytest.fail("measured"))
    assert Limit.measure(work(), Ranks(rank=1, count=2), ctx) == Limit()
    assert Limit.measure(None, Ranks(), ctx) == Limit()


def test_the_peak_is_said(ctx, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(StageContext, "note", lambda _, text: said.append(text))
    monkeypatch.setattr(watch, "peaks", lambda *_: {"fp8": 1.4e15, "bf16": 8.034e14})
    assert Limit.measure(work(fp8=True), Ranks(count=4), ctx).ranks == 4
    (text,) = said
    assert text == (
        "matrix products reach fp8 1,400.0 TFLOP/s, bf16 803.4 TFLOP/s on this device: "
        "MFU is the share of that"
    )


def test_a_slow_step_moves_no_curve():
    assert plots.middles([1, 9, 9, 9, 2, 9], 3) == [1, 5, 9, 9, 9, 9]


# --- which steps are recorded ---------------------------------------------------------------------


def test_a_window_names_its_first_and_last_step():
    assert Window.parse("10:13") == (10, 13)
    assert Window.parse("7:7") == (7, 7)
    assert str(Window(10, 13)) == "10:13"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("10-13", "--profile-steps is '10-13', not FIRST:LAST", "--profile-steps 10:13"),
        ("10:", "not FIRST:LAST", "--profile-steps 10:13"),
        ("-1:3", "not FIRST:LAST", "--profile-steps 10:13"),
        ("13:10", "is 13:10: its first step comes after its last", "--profile-steps 10:13"),
        ("0:3", "is 0:3, but steps are counted from 1", "--profile-steps 1:3"),
        ("5:900", "is 5:900, which is 896 steps: a trace holds 50 at most", "--profile-steps 5:8"),
    ],
)
def test_what_is_no_window_is_refused_with_one_that_is(text, message, hint):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        Window.parse(text)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"write {hint}")
    assert caught.value.exit_code == 2


def test_a_window_beyond_the_last_step_is_refused_before_the_model_is_loaded(ctx):
    ctx = StageContext({}, ctx.output, ctx.state, ctx.recipe_dir, profile_steps=(10, 13))
    with pytest.raises(
        UsageError, match="--profile-steps is 10:13, but the last step is 8"
    ) as caught:
        watching(ctx, total=8)
    assert caught.value.hint == "write --profile-steps 5:8, or train longer"


def status(artifact: Path | None = None, stage: str = "train") -> Any:
    made = types.SimpleNamespace(path=artifact) if artifact else None
    step = types.SimpleNamespace(stage=stage, name=stage)
    return types.SimpleNamespace(step=step, artifact=made)


def recipe(max_steps: int | None = None) -> Any:
    return types.SimpleNamespace(train=types.SimpleNamespace(max_steps=max_steps))


def test_a_step_that_is_done_cannot_be_recorded(tmp_path):
    with pytest.raises(UsageError, match="but step train is done: nothing is trained") as caught:
        insist(Window(10, 13), recipe(), [status(tmp_path)])
    assert caught.value.hint is not None
    assert "--set train.max_steps=14" in caught.value.hint


def test_the_same_command_may_be_given_again_when_it_is_done(tmp_path):
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "steps-10-13.json.gz").touch()
    insist(Window(10, 13), recipe(), [status(tmp_path)])
    insist(Window(10, 13), recipe(13), [status()])


def test_a_window_is_for_commands_that_train():
    with pytest.raises(UsageError, match="but no step of this command trains"):
        insist(Window(1, 2), types.SimpleNamespace(train=None), [status(stage="quantize")])
    with pytest.raises(UsageError, match=r"is 10:13, but train\.max_steps is 12"):
        insist(Window(10, 13), recipe(12), [status()])


def test_a_profile_goes_to_mlflow_whatever_its_kind(tmp_path):
    (tmp_path / "profile").mkdir()
    for name in ("profile/steps-1-2.json.gz", "profile/steps-1-2.txt", "merges.txt", "loss.png"):
        (tmp_path / name).write_bytes(b"x")
    names = {str(path.relative_to(tmp_path)) for path in small_files(tmp_path)}
    assert names == {"loss.png", "profile/steps-1-2.json.gz", "profile/steps-1-2.txt"}
    assert PROFILE_LIMIT == 200 * 2**20
