"""Out of memory while training: explained with the forecast's numbers, or survived with half the micro-batch.

``train.on_oom: halve_batch`` repeats the step that failed, on the same weights, with its micro-batches
cut in two: the same rows, and the same loss, because it is averaged over the trained tokens of the
whole step. From then on all steps are cut. Several ranks start again for that, together: see
``parallel/again.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from toolkit.errors import StepFailedError
from toolkit.forecast import training
from toolkit.forecast.changes import smallest
from toolkit.forecast.parts import Part, gib, summed
from toolkit.forecast.training import Setup
from toolkit.recipe.train import TrainSection
from toolkit.stages import StageContext
from toolkit.train.order import MicroBatch, Step
from toolkit.train.parallel import again

if TYPE_CHECKING:
    from toolkit.train.parallel.engine import Engine

T = TypeVar("T")


class Guard:
    """Stands around the forward and backward passes of each step.

    Args:
        config: ``on_oom`` and ``batch_size``.
        setup: What the forecast is made of; ``None`` for a model of another kind.
        ctx: Where it is said and logged.
        engine: Whose gradients a failed attempt leaves.
        keep: Writes down what the last step left, on a rank that holds all of it.
    """

    def __init__(
        self,
        config: TrainSection,
        setup: Setup | None,
        ctx: StageContext,
        engine: Engine,
        keep: Callable[[], None] = lambda: None,
    ) -> None:
        before = again.why_here(ctx.state)
        self.at_once = before.at_once if before else config.batch_size
        """Sequences of one forward pass, at most."""
        self._halves = config.on_oom == "halve_batch"
        self._keep = keep
        self._setup = setup
        self._ctx = ctx
        self._engine = engine

    def run(self, step: Step, done: int, compute: Callable[[Step], T]) -> T:
        """``compute(step)``, again with smaller micro-batches when memory runs out.

        Args:
            step: What to compute.
            done: Optimizer steps before it.
            compute: Adds up the gradients of a step.

        Raises:
            StepFailedError: Out of memory, and nothing is left to halve, or all ranks have to start
                again for it; says what took it.
        """
        while True:
            cut = replace(step, batches=tuple(pieces(step, self.at_once)))
            finished, result, failure = _attempt(compute, cut)
            if finished is not None:
                return result[0]
            self._engine.optimizer.zero_grad(set_to_none=True)
            free_memory()
            largest = max(map(len, cut.batches))
            if not self._halves or largest == 1:
                raise self._explained(failure, done, cut)
            self.at_once = max(1, largest // 2)
            if self._engine.ranks.count > 1:
                self._ask_all(done, largest)
                raise self._explained(failure, done, cut)
            self._ctx.note(
                f"out of GPU memory at step {done + 1} with {_counted(largest)} at a time: the step "
                f"is repeated with {self.at_once}, the same rows and the same loss"
            )
            self._ctx.log(done + 1, out_of_memory=1.0, sequences_at_once=float(self.at_once))

    def _ask_all(self, done: int, largest: int) -> None:
        """Others wait for this rank in the middle of a pass: only a new start of all gets them out."""
        ranks = self._engine.ranks
        if not self._engine.shares_state:
            self._keep()
        wanted = again.Again(ranks.rank, ranks.count, done + 1, largest, self.at_once)
        wanted.leave(self._ctx.state, again.starts())

    def _explained(self, failure: str, done: int, step: Step) -> StepFailedError:
        largest = _counted(max(map(len, step.batches)))
        ways = (
            [] if self._halves else ["train.on_oom: halve_batch goes on with smaller micro-batches"]
        )
        return explained(failure, done, f"with {largest} at a time", self._setup, ways)


def explained(
    failure: str, done: int, tried: str, setup: Setup | None, ways: Sequence[str] = ()
) -> StepFailedError:
    """What took the memory, and what takes less.

    Args:
        failure: What PyTorch said.
        done: Optimizer steps before.
        tried: What did not fit, in words.
        setup: What the forecast is made of.
        ways: Other ways out, in words.
    """
    return StepFailedError(
        f"out of GPU memory at step {done + 1}, {tried}: {failure.partition('. ')[0]}{_forecast(setup)}",
        _advice(setup, ways),
    )


def _attempt(compute: Callable[[Step], T], step: Step) -> tuple[bool | None, list[T], str]:
    """(True, [result], "") or (None, [], why): the traceback, which holds tensors, is gone by then."""
    import torch

    try:
        return True, [compute(step)], ""
    except torch.OutOfMemoryError as error:
        return None, [], str(error)


def pieces(step: Step, at_once: int) -> list[MicroBatch]:
    """The micro-batches of ``step``, none of more than ``at_once`` sequences, rows in the same order."""
    found: list[MicroBatch] = []
    for batch in step.batches:
        found += [batch[i : i + at_once] for i in range(0, len(batch), at_once)]
    return found


def _counted(sequences: int) -> str:
    return "1 sequence" if sequences == 1 else f"{sequences} sequences"


def free_memory() -> None:
    """Give what a failed attempt left back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpu_bytes() -> int | None:
    """Memory of this process's GPU, if it has one."""
    import torch

    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None


def _forecast(setup: Setup | None) -> str:
    if setup is None:
        return ""
    said = training.forecast(setup)
    rows = setup.rows
    shape = f"{rows.sequences} x {rows.length} tokens, {rows.trained} trained"
    return f"\nforecast for the largest micro-batch ({shape}): {summed(said.parts)}{_measured()}"


def _measured() -> str:
    import torch

    total = gpu_bytes()
    if total is None:
        return ""
    found = [
        Part("allocated", torch.cuda.max_memory_allocated()),
        Part("reserved", torch.cuda.max_memory_reserved()),
    ]
    shown = ", ".join(f"{part.name} {gib(part.bytes)}" for part in found)
    return f"\nmeasured: {shown} of {gib(total)} GiB"


def _advice(setup: Setup | None, given: Sequence[str]) -> str:
    ways = list(given)
    total = gpu_bytes()
    # what ran out took more than the forecast says, or others hold memory: look for room below that
    room = min(total, training.forecast(setup).total) * 0.9 if setup and total else None
    if setup and room:
        found = smallest(setup, int(room))
        ways += [f"set {found.text} ({gib(found.forecast.total)} GiB)"] if found else []
    if not ways or not room:
        ways.append("lower train.batch_size or model.max_length, or set train.method: qlora")
    return "; or ".join(ways)
