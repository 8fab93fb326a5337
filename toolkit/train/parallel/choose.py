"""``train.parallel: auto``: how several GPUs share the work, and why, in one sentence. Pure, no torch.

What must fit beside activations is the forecast's: weights, gradients and optimizer states, held whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.forecast import training
from toolkit.forecast.block import Rows
from toolkit.preflight.base_facts import BaseFacts, shape_of
from toolkit.preflight.gpu import GpuFacts
from toolkit.recipe.train import TrainSection

GIB = 2**30

ROOM = 0.6
"""Share of a GPU that weights and their state may take; the rest is for activations."""


@dataclass(frozen=True)
class Choice:
    """What ``auto`` came to."""

    parallel: str
    reason: str
    """The rest of a sentence that begins with the engine's name."""


def choose(
    train: TrainSection, ranks: int, base: BaseFacts | None, gpu: GpuFacts | None
) -> Choice | None:
    """How ``ranks`` processes share the work; ``None`` where there is nothing to choose.

    Args:
        train: The recipe's section.
        ranks: Processes over all nodes.
        base: What is known of the base.
        gpu: One of the GPUs; ``None`` on a CPU.
    """
    if ranks == 1 or train.parallel != "auto":
        return None
    if whole := _why_whole(train, gpu):
        return Choice("ddp", whole)
    needed = bytes_whole(train, base) if base else None
    if needed is None or gpu is None or gpu.memory_bytes is None:
        return _unknown(train)
    shown = f"{needed / GIB:.1f} GiB of weights and their state"
    room = f"{ROOM:.0%} of {gpu.memory_bytes / GIB:.0f} GiB"
    if needed <= ROOM * gpu.memory_bytes:
        return Choice("ddp", f"{shown} fit into {room} of each GPU")
    return Choice("fsdp", f"{shown} are more than {room}: each GPU holds 1/{ranks} of them")


def _why_whole(train: TrainSection, gpu: GpuFacts | None) -> str | None:
    """Why every process has to hold everything, whatever its size; ``None`` where it has not."""
    if train.objective != "sft":
        return f"the trainer of {train.objective} copies the model to each GPU"
    if train.optimizer == "adamw_8bit":
        return "8-bit AdamW keeps its state in blocks, which cannot be shared out"
    if train.lora.init != "default":
        return f"the start of {train.lora.init} is made from whole weights"
    return None if gpu else "nothing has to be shared out on a CPU"


def bytes_whole(train: TrainSection, base: BaseFacts) -> int | None:
    """Weights, gradients and optimizer state, held whole by one GPU; ``None`` where the config is silent."""
    shape = shape_of(base)
    if shape is None:
        return None
    in_fp8 = train.base_precision == "fp8"
    lora = train.lora
    setup = training.Setup(
        shape,
        train.method,
        "nf4" if train.method == "qlora" else "fp8_once" if in_fp8 else "bf16",
        2,
        Rows(1, 1, 1),
        targets=tuple(shape.linears) if lora.targets == "all-linear" else lora.targets,
        rank=lora.rank,
        optimizer=train.optimizer,
    )
    return round(training.held_bytes(setup))


def _unknown(train: TrainSection) -> Choice:
    if train.method == "full":
        return Choice(
            "fsdp", "full fine-tuning takes 16 bytes a weight, and the sizes are not known yet"
        )
    return Choice("ddp", "an adapter is small, and the sizes of the base are not known yet")
