"""Which process of a training run this is, and what all of them agree on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

TIMEOUT = timedelta(minutes=30)
"""How long one rank waits for the others: longer than writing a large checkpoint takes."""


@dataclass(frozen=True)
class Ranks(AbstractContextManager["Ranks"]):
    """This process among those that train together. A run of one process agrees with itself.

    Entered, it joins the others; left, it leaves them. Small numbers and objects go over gloo on
    the CPU on every machine, so that an agreement never waits for a GPU's queue.

    Attributes:
        rank: Number of this process, from 0; only rank 0 speaks and writes.
        count: Processes over all nodes.
        local: Number of this process on its node: the number of its GPU.
        device: ``cpu`` or ``cuda``.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    device: str = "cpu"

    @classmethod
    def here(cls, device: str, environ: Mapping[str, str] = os.environ) -> Self:
        """The rank that torchrun gave to this process; the only one without torchrun."""
        if "TORCHELASTIC_RUN_ID" not in environ:
            return cls(device=device)
        named = (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"])
        rank, count, local = map(int, named)
        return cls(rank, count, local, device)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and logs."""
        return self.rank == 0

    def __enter__(self) -> Self:
        if self.count > 1:
            import torch
            import torch.distributed as dist

            backend = "gloo"
            if self.device == "cuda":
                torch.cuda.set_device(self.local)
                backend = "cpu:gloo,cuda:nccl"
            if not dist.is_initialized():  # DeepSpeed cannot meet twice in one process
                dist.init_process_group(backend, timeout=TIMEOUT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Part when all are done; after an error others may hang, and waiting would hang with them."""
        if kind is None:
            self.wait()

    def total(self, *values: float) -> list[float]:
        """Each value added up over all ranks, in float64."""
        if self.count == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return [float(value) for value in summed]

    def any(self, mine: bool) -> bool:
        """Whether it is so on some rank; the same answer on all."""
        return self.total(float(mine))[0] > 0

    def all_of(self, mine: Any) -> list[Any]:
        """The object of every rank, in their order."""
        if self.count == 1:
            return [mine]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine, group=self._cpu_group())
        return found

    def wait(self) -> None:
        """Go on when all ranks are here."""
        self.total(0.0)

    def _cpu_group(self) -> Any:
        """The default group, over gloo: objects are pickled into CPU tensors."""
        if self.device == "cpu":
            return None
        return _gloo_group()


_GLOO: list[Any] = []


def _gloo_group() -> Any:
    """A gloo group beside NCCL, made once: by all ranks, at the same place of the program."""
    import torch.distributed as dist

    if not _GLOO:
        _GLOO.append(dist.new_group(backend="gloo", timeout=TIMEOUT))
    return _GLOO[0]
