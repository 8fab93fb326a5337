"""Several ranks, one of them out of memory: all start again with smaller micro-batches. No torch.

The rank that fails in the middle of a pass cannot agree with the others, which wait for it in a
collective. So it leaves ``again-0.json`` in the state folder (the number counts starts) and ends.
Every node's launcher finds that file and starts its ranks anew, and they go on together with what
it says: from the last step where one rank holds all that is trained, else from the last checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

STARTS = "TOOLKIT_RANKS_STARTS"
"""Environment variable of ranks: how often they were started before, within one run of the step."""


@dataclass(frozen=True)
class Again:
    """Why all ranks start again, and with what."""

    rank: int
    ranks: int
    step: int
    """The step that failed, from 1."""
    sequences: int
    """Sequences of one forward pass that were too many."""
    at_once: int
    """Sequences of one forward pass from now on."""

    def leave(self, state: Path, start: int) -> None:
        """Ask for it; of several ranks that fail at once, all say the same."""
        part = state / f"again-{start}.{os.getpid()}.part"
        part.write_text(json.dumps(asdict(self)))
        part.rename(state / f"again-{start}.json")

    @property
    def says(self) -> str:
        """For people."""
        passes = "1 sequence" if self.sequences == 1 else f"{self.sequences} sequences"
        return (
            f"rank {self.rank} of {self.ranks} ran out of GPU memory at step {self.step} with "
            f"{passes} at a time: all ranks start again with {self.at_once}, the same rows and the "
            "same loss"
        )


def asked(state: Path, start: int) -> Again | None:
    """What a rank of that start asked for, if any did."""
    file = state / f"again-{start}.json"
    return Again(**json.loads(file.read_text())) if file.is_file() else None


def starts(environ: Mapping[str, str] = os.environ) -> int:
    """How often the ranks of this run were started before."""
    return int(environ.get(STARTS, "0"))


def why_here(state: Path) -> Again | None:
    """In a rank: why it was started again; ``None`` the first time."""
    before = starts()
    return asked(state, before - 1) if before else None


def forget(state: Path) -> None:
    """Remove what an older run left."""
    for old in state.glob("again-*"):
        old.unlink(missing_ok=True)
