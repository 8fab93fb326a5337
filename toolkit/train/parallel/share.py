"""Which micro-batches of a step are whose: pure.

A step is planned for all ranks together and dealt out like cards: round ``n`` gives micro-batch
``n * ranks + rank``. So the plan, the ledger of its rows and the averaged loss do not depend on
how many ranks there are, and a run goes on where it was on another number of GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.train.order import MicroBatch


@dataclass(frozen=True)
class Turn:
    """One forward pass of one rank."""

    sequences: MicroBatch
    idle: bool = False
    """Nothing was left for this rank: it computes along, because others wait for it in their
    collectives, and its loss counts nothing."""


def share(batches: Sequence[MicroBatch], rank: int, ranks: int) -> list[Turn]:
    """The forward passes of ``rank``: as many as every other rank has.

    An idle turn takes one real row, so that no code has to know batches without a target.

    Args:
        batches: Micro-batches of all ranks together; at least one.
        rank: From 0.
        ranks: How many there are.
    """
    rounds = -(-len(batches) // ranks)
    mine = [Turn(batch) for batch in batches[rank::ranks]]
    spare = Turn([batches[0][0][:1]], idle=True)
    return mine + [spare] * (rounds - len(mine))
