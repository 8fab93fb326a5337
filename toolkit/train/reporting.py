"""What TRL logs, by our names: metrics, the progress line, and what SIGTERM asks for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from toolkit.train.interrupt import StopOnTerm
from toolkit.train.sft import seed_everything
from toolkit.train.watch.watch import Limit, Watch

if TYPE_CHECKING:
    from toolkit.train.trainer import Run

UNTOLD = ("num_tokens", "step_time", "total_flos", "runtime", "per_second", "profiling")
"""Parts of the names of numbers that TRL logs and we do not: ours say the same, or nobody asks."""


def plain_names(logs: Mapping[str, Any]) -> dict[str, float]:
    """Numbers that TRL logs by our names: ``eval_rewards/margins`` is ``heldout_rewards_margins``."""
    found = {}
    for name, value in logs.items():
        if not isinstance(value, int | float) or any(part in name for part in UNTOLD):
            continue
        ours = name.replace("eval_", "heldout_", 1) if name.startswith("eval_") else name
        found[ours.replace("/", "_")] = float(value)
    return found


def _shown(run: Run) -> dict[str, float | str]:
    """What stands in the progress line."""
    found: dict[str, float | str] = {}
    found |= {k: f"{run.last[k]:.4f}" for k in ("loss", "reward") if k in run.last}
    found |= run.watch.shown()
    return found | {k: run.last[k] for k in ("learning_rate", "grad_norm") if k in run.last}


def reporter(run: Run, stop: StopOnTerm, watches: ExitStack) -> Any:
    """The callback that writes metrics, moves the progress line and obeys SIGTERM.

    ``watches`` ends what it starts to watch with.
    """
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            if run.ranks.rank:
                seed_everything(run.seed + run.ranks.rank)  # weights began alike; dropout differs
            watch = Watch(Limit(), run.ranks, run.ctx, run.position, state.max_steps)
            run.watch = watches.enter_context(watch)

        def on_step_begin(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            run.watch.begin(state.global_step + 1)
            self.started, self.tokens = time.perf_counter(), run.position.tokens

        def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
            position, total = run.position, state.max_steps
            seconds = time.perf_counter() - self.started
            position.step = state.global_step
            position.seconds += seconds
            run.watch.end(position.step, seconds, position.tokens - self.tokens)
            last, stopping = position.step >= total, run.ranks.any(stop.requested)
            control.should_log |= last
            control.should_save = not last and (control.should_save or stopping)
            control.should_training_stop |= stopping
            run.ctx.progress(position.step, total, "steps", **_shown(run))

        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            if "train_runtime" in logs:  # the summary at the end
                return
            found = plain_names(logs)
            if any(name.startswith("heldout_") for name in found):
                run.heldout = {k: v for k, v in found.items() if k.startswith("heldout_")}
                run.ctx.log(state.global_step, **run.heldout)
                return
            run.last = found
            run.ctx.log(state.global_step, **(found | run.watch.numbers()))

        def on_save(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            run.watch.settle(run.position)
            run.mark(run.folder / f"checkpoint-{state.global_step}")

    return Reporter()
