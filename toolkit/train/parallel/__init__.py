"""One training run on several GPUs.

The step loop (``train/sft.py``) is the same for one process and for many. What differs stands here::

    ranks.py    which process this is; sums and agreements between all
    share.py    which micro-batches of a step are whose
    engine.py   forward, backward, update, state: one process, the trivial engine
    ddp.py      every rank holds everything, gradients are averaged
    fsdp.py     FSDP2: each rank holds a part of every decoder layer
    zero.py     DeepSpeed ZeRO-2 and ZeRO-3
    choose.py   what ``train.parallel: auto`` comes to (pure, no torch)
    launch.py   torchrun: its command line, and one clear error out of many processes
    again.py    all ranks start again with smaller micro-batches when one ran out of memory

Two rules hold for every engine: the loss is averaged over the trained tokens of the whole step,
and all ranks make the same number of forward passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.registry import Registry

if TYPE_CHECKING:
    from toolkit.train.parallel.engine import Engine
    from toolkit.train.parallel.ranks import Ranks

ENGINES = Registry(
    "engine of several ranks",
    {
        "ddp": "toolkit.train.parallel.ddp:DataParallel",
        "fsdp": "toolkit.train.parallel.fsdp:FullyShard",
        "zero2": "toolkit.train.parallel.zero:Zero2",
        "zero3": "toolkit.train.parallel.zero:Zero3",
    },
)


def engine_of(wanted: str, ranks: Ranks) -> type[Engine]:
    """The class for ``train.parallel``; one process needs none of them.

    ``auto`` is resolved when the plan is made. A recipe that comes here without a plan gets DDP.
    """
    from toolkit.train.parallel.engine import Engine

    if ranks.count == 1:
        return Engine
    found: type[Engine] = ENGINES["ddp" if wanted == "auto" else wanted]
    return found
