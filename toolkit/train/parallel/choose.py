"""``train.parallel: auto``: how several GPUs share the work, and why, in one sentence. Pure, no torch.

What must fit beside activations, for each weight (Rajbhandari et al. 2020, arXiv:1910.02054, section
3.1, with float32 master weights): a trained one takes 16 bytes (weight, gradient, two moments of
AdamW), a frozen one what it is stored in.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.preflight.base_facts import LINEARS, BaseFacts
from toolkit.preflight.gpu import GpuFacts
from toolkit.recipe.train import TrainSection

GIB = 2**30

TRAINED_BYTES = 16
"""Of one trained weight: float32 weight, gradient and the two moments of AdamW."""

NF4_BYTES = 0.56
"""Of one weight in NF4 with double quantization, scales included."""

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
    parameters, stored = base.parameters, base.weight_bytes
    if parameters is None or stored is None:
        return None
    if train.method == "full":
        return parameters * TRAINED_BYTES
    adapter = _adapter_weights(train, base) * TRAINED_BYTES
    if train.method == "lora":
        return parameters * 2 + adapter
    linear = sum(out * width for _, (out, width) in _linears(base)) * _layers(base)
    return int(linear * NF4_BYTES) + (parameters - linear) * 2 + adapter


def _adapter_weights(train: TrainSection, base: BaseFacts) -> int:
    """A [rank, inputs] and B [outputs, rank] of every targeted linear layer."""
    wanted = train.lora.targets
    chosen = [shape for name, shape in _linears(base) if wanted == "all-linear" or name in wanted]
    return train.lora.rank * _layers(base) * sum(out + width for out, width in chosen)


def _linears(base: BaseFacts) -> list[tuple[str, tuple[int, int]]]:
    return [(name, shape) for name in LINEARS if (shape := base.linear(name))]


def _layers(base: BaseFacts) -> int:
    return base.number("num_hidden_layers") or 0


def _unknown(train: TrainSection) -> Choice:
    if train.method == "full":
        return Choice(
            "fsdp", "full fine-tuning takes 16 bytes a weight, and the sizes are not known yet"
        )
    return Choice("ddp", "an adapter is small, and the sizes of the base are not known yet")
