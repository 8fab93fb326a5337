"""A window of steps under PyTorch's profiler: a trace for Perfetto, and the dearest operators as text.

The first rank alone is recorded: it does the same work as the others, and waits for them where they
are slower. The files lie in the step's state folder as soon as the window is over, and go into the
artifact with everything else. What is trained does not change: a fingerprint knows nothing of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from toolkit.stages import StageContext
from toolkit.train.watch.window import FOLDER, Window, trace_of

OPERATORS = 20
"""Lines of the table."""

NAME_WIDTH = 60


class Recorder:
    """Records the steps of a window, however many of them a resumed run has left.

    Args:
        window: Which.
        done: Steps that earlier processes took.
        ctx: Where to write, and on which device it runs.
    """

    def __init__(self, window: Window, done: int, ctx: StageContext) -> None:
        self.window = window._replace(first=max(window.first, done + 1))
        self._ctx = ctx
        self._profiler: Any = None
        self._label: Any = None
        if self.window.first > self.window.last:
            ctx.note(f"--profile-steps {window} was over before step {done + 1}: nothing to record")
        elif self.window != window:
            ctx.note(f"going on after step {done}: steps {self.window} are recorded")

    def before(self, step: int) -> None:
        """Step ``step`` begins."""
        if not self.window.first <= step <= self.window.last:
            return
        from torch.profiler import record_function

        if self._profiler is None:
            self._start()
        self._label = record_function(f"step {step}")
        self._label.__enter__()

    def after(self, step: int) -> None:
        """Step ``step`` is over."""
        if self._label is None:
            return
        self._label.__exit__(None, None, None)
        self._label = None
        if step == self.window.last:
            self._save()

    def drop(self) -> None:
        """Forget what was recorded: training ended within the window."""
        if self._label is not None:
            self._label.__exit__(None, None, None)
            self._label = None
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._ctx.device == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._wait()
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def _save(self) -> None:
        """Write both files beside each other, then move them into place together."""
        profiler, self._profiler = self._profiler, None
        self._wait()
        profiler.stop()
        part = self._ctx.state / f"{FOLDER}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        profiler.export_chrome_trace(str(part / f"{self.window.file}.json.gz"))
        (part / f"{self.window.file}.txt").write_text(self._table(profiler))
        final = self._ctx.state / FOLDER
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        self._ctx.note(
            f"steps {self.window} are recorded: {trace_of(self.window, self._ctx.state)}"
        )

    def _table(self, profiler: Any) -> str:
        on_gpu = self._ctx.device == "cuda"
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        operators = profiler.key_averages()
        # labels, such as that of a step, hold the time of all within them a second time
        operators[:] = [one for one in operators if not one.is_user_annotation]
        shown: str = operators.table(
            sort_by=key, row_limit=OPERATORS, max_name_column_width=NAME_WIDTH
        )
        head = f"Steps {self.window} of rank 0; the {OPERATORS} operators that took most by themselves."
        return f"{head}\n\n{shown}"

    def _wait(self) -> None:
        """Let the GPU finish: what it does belongs to the step that asked for it."""
        if self._ctx.device == "cuda":
            import torch

            torch.cuda.synchronize()


def keep(state: Path, output: Path) -> None:
    """Put what was recorded into the artifact."""
    if (state / FOLDER).is_dir():
        shutil.copytree(state / FOLDER, output / FOLDER)
