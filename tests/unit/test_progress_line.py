"""What the progress line says: short, on one line of a terminal, now and then in a log."""

from __future__ import annotations

import os

import pytest

from toolkit.cli import render

SHOWN = {
    "loss": "1.2345", "eta_s": 3725.0, "tokens_per_second": 15547.3, "mfu_percentage": 62.4,
    "peak_gpu_memory_gib": 55.12, "gpu_utilization_percentage": 99.0,
    "gpu_power_usage_watts": 641.7, "learning_rate": 0.0002, "grad_norm": 0.41234,
}  # fmt: skip


def event(done: float, shown: dict[str, float | str], unit: str = "steps", total: float = 200):
    return {"event": "progress", "done": done, "total": total, "unit": unit, "shown": shown}


@pytest.fixture
def log(capsys, monkeypatch):
    """Standard error of a job: every event is a line."""
    monkeypatch.setattr(render.ProgressLine.__init__, "__defaults__", (0.0,))
    progress = render.Progress()
    progress.show("train", {"event": "started"})
    capsys.readouterr()

    def show(*events):
        for one in events:
            progress.show("train", one)
        return capsys.readouterr().err.splitlines()

    return show


def test_a_step_says_when_it_ends_how_fast_it_is_and_what_it_takes(log):
    (line,) = log(event(20, SHOWN))
    assert line.split("  ", 2)[0] == "train"
    assert line.endswith(
        "10% 20/200 steps  loss 1.2345  ETA 1h02m  15,547 tok/s  MFU 62%  55.1 GiB  GPU 99%  642 W  "
        "lr 2.0e-04  grad 0.412"
    )


def test_between_two_steps_the_numbers_stay(log):
    _, line = log(event(20, SHOWN), event(20.5, {}))
    assert "20.5/200 steps  loss 1.2345  ETA 1h02m" in line


def test_numbers_of_another_step_do_not_stay(log):
    *_, line = log(event(20, SHOWN), {"event": "started"}, event(1, {}, "rows", 9))
    assert line.endswith("11% 1/9 rows")


def test_other_values_stand_with_their_names_and_bytes_as_megabytes(log):
    assert log(event(3, {"token": 17, "side": "train"}, "rows", 0))[0].endswith(
        "3 rows  token 17  side train"
    )
    assert log(event(136293000, {}, "B", 272586000))[0].endswith("50% 136.293/272.586 MB")


def test_a_terminal_gets_no_more_than_fits_into_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(render.shutil, "get_terminal_size", lambda: os.terminal_size((60, 24)))
    render.ProgressLine("train").update(render._progress_text(event(20, SHOWN), SHOWN))
    line = capsys.readouterr().err.rpartition("\x1b[2K")[2]
    assert len(line) == 59
    assert "loss 1.2345" in line
