"""Which rows go into which optimizer step: planned before the first one, from lengths and a seed.

Nesting, from the outside: a step holds micro-batches, a micro-batch sequences, a sequence row
numbers (one row, or several packed). A resumed run makes the same plan again and skips what was
done; the ledger proves that it did.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from toolkit.errors import DataError
from toolkit.recipe.train import TrainSection

Rows = list[int]  # rows of one sequence
MicroBatch = list[Rows]  # sequences of one forward pass

BUCKET = 32
"""Micro-batches sorted by length together when rows are padded: less padding, still random."""


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    epoch: int  # 0-based
    batches: tuple[MicroBatch, ...]

    @property
    def rows(self) -> list[int]:
        """Rows in the order in which they are seen."""
        return [row for batch in self.batches for sequence in batch for row in sequence]


@dataclass
class RowLedger:
    """Which rows were seen, in which order: a count and a chained sha256 for checkpoints."""

    seen: int = 0
    digest: str = ""

    def add(self, rows: Sequence[int]) -> None:
        """Account for the rows of one optimizer step."""
        text = f"{self.digest}:{','.join(map(str, rows))}"
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.seen += len(rows)

    @classmethod
    def of(cls, steps: Iterable[Step]) -> RowLedger:
        """The ledger of a run that took exactly these steps."""
        ledger = cls()
        for step in steps:
            ledger.add(step.rows)
        return ledger


def plan_steps(
    rows: Sequence[int], lengths: Sequence[int], config: TrainSection, max_length: int, seed: int
) -> list[Step]:
    """All optimizer steps of a run.

    Every epoch is shuffled (and packed) anew and sees each row exactly once. A step never reaches
    into the next epoch, so the last one of an epoch may be smaller. A fraction of an epoch is its
    first steps.

    Args:
        rows: Rows to train on.
        lengths: Tokens of each of ``rows``, in the same order.
        config: Batch size, accumulation, epochs or steps, packing.
        max_length: Tokens of a packed sequence.
        seed: The recipe's seed.

    Raises:
        DataError: No rows, or a row is longer than ``max_length``.
    """
    _check(rows, lengths, max_length)
    steps: list[Step] = []
    epoch = 0
    while not _enough(steps, epoch, config):
        batches = micro_batches(rows, lengths, config, max_length, (seed, epoch))
        taken = _group(epoch, batches, config.gradient_accumulation)
        if config.max_steps is None and config.epochs - epoch < 1:
            taken = taken[: math.ceil((config.epochs - epoch) * len(taken))]
        steps += taken
        epoch += 1
    return steps[: config.max_steps]


def micro_batches(
    rows: Sequence[int],
    lengths: Sequence[int],
    config: TrainSection,
    max_length: int,
    seed: tuple[int, int],
) -> list[MicroBatch]:
    """Every row once, in micro-batches of ``config.batch_size`` sequences, shuffled by ``seed``."""
    import numpy as np

    random = np.random.default_rng(seed)
    batch_size = config.batch_size
    if config.packing:
        from toolkit.data.packing import pack

        packed = pack(lengths, max_length, int(random.integers(2**31)))
        return _chunks([[rows[i] for i in sequence] for sequence in packed], batch_size)
    shuffled = random.permutation(len(rows)).tolist()
    batches: list[MicroBatch] = []
    for bucket in _chunks(shuffled, BUCKET * batch_size):
        by_length = sorted(
            bucket, key=lambda i: -lengths[i]
        )  # stable: ties keep the shuffled order
        batches += [[[rows[i]] for i in part] for part in _chunks(by_length, batch_size)]
    return [batches[k] for k in random.permutation(len(batches))]


def _enough(steps: list[Step], epoch: int, config: TrainSection) -> bool:
    return len(steps) >= config.max_steps if config.max_steps else epoch >= config.epochs


def _group(epoch: int, batches: list[MicroBatch], accumulation: int) -> list[Step]:
    return [Step(epoch, tuple(part)) for part in _chunks(batches, accumulation)]


def _chunks(items: list, size: int) -> list[list]:  # type: ignore[type-arg]
    return [items[i : i + size] for i in range(0, len(items), size)]


def _check(rows: Sequence[int], lengths: Sequence[int], max_length: int) -> None:
    if not rows:
        raise DataError(
            "the training rows have no trained token: nothing to learn from",
            "look at the ledger of the data step: does the chat template render the answers?",
        )
    longest = max(range(len(rows)), key=lambda i: lengths[i])
    if lengths[longest] > max_length:
        raise DataError(
            f"training row {rows[longest]} has {lengths[longest]} tokens, "
            f"more than model.max_length {max_length}",
            "the data step drops or truncates such rows: run it again with this model.max_length",
        )
