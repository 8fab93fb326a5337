"""Peak memory of a training run on one GPU: the moment at which most is alive, and what is alive then. Pure.

The moments of an optimizer step:

- *loss*: all blocks keep what they keep, and the logits are at their most.
- *block*: the first block's backward pass; with recomputing, all of that block is alive again.
- *end*: the last block's backward pass, with the gradients of all the others (matters with ``full``).

Sources: PyTorch's log_softmax keeps its fp32 result, and its backward makes the gradient of both
(aten/native/SoftMax); AdamW holds two fp32 states (torch/optim/adamw.py), the 8-bit one two bytes
and a scale per 256 (bitsandbytes, optim/optimizer.py); NF4 with double quantization is 4.127 bits
a weight (arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from toolkit.forecast.block import FLOAT, Keep, Numbers, Rows, has_adapter, kept_fused, kept_plain
from toolkit.forecast.parts import CONTEXT_BYTES, Fit, Forecast, parts
from toolkit.forecast.shape import ModelShape

Base = Literal["bf16", "fp32", "nf4", "fp8", "fp8_once"]
"""In which form the base lies in memory; ``fp8`` holds every weight twice, once for each direction."""
Parallel = Literal["ddp", "zero2", "zero3", "fsdp"]

SHARDED: dict[str, frozenset[str]] = {
    "ddp": frozenset(),
    "zero2": frozenset({"gradients", "optimizer"}),
    "zero3": frozenset({"gradients", "optimizer", "weights"}),
    "fsdp": frozenset({"gradients", "optimizer", "weights"}),
}
"""What each parallel mode shares out among the GPUs."""

NF4_BYTES = 0.5 + (1 + FLOAT / 256) / 64
"""Of one weight: half a byte, one 8-bit scale per 64, and one fp32 per 256 of those."""
STATE_8BIT_BYTES = 2 * (1 + FLOAT / 256)
STATE_BYTES = 2 * FLOAT

KEEPS: tuple[Keep, ...] = ("products", "but_mlp", "attention", "nothing")
"""What the fast path may keep, the most first (train/speed/recompute.py)."""

LOGITS_BYTES = 3 * FLOAT
"""Of one logit in the backward pass: log-softmax, its gradient, and that of the logits, all fp32."""
PIECE = 1024
"""Rows of logits that exist at once with the fused loss (train/speed/loss.py)."""
PIECE_BYTES = 2 + 2
"""Of one logit there: itself and its gradient in bf16; what is between is fused."""

WORKSPACE_BYTES = 64 * 2**20
"""Of cuBLAS and cuBLASLt on Hopper: 32 MiB each (aten/cuda/CUDABlas.cpp)."""
LOOSE_SHARE = 0.06
"""Of what comes and goes, held by PyTorch's allocator in blocks that fit nothing that is asked for (measured)."""


@dataclass(frozen=True)
class Setup:
    """All that decides the memory of training.

    Attributes:
        shape: Of the model.
        method: As in the recipe.
        base: In which form the base's linear layers lie in memory.
        width: Bytes of an activation: 2 in bf16, 4 in fp32.
        rows: The largest micro-batch.
        targets: Linear layers with an adapter.
        rank: Of the adapters.
        keep: What a block keeps for its backward pass.
        fused: Whether linear layers, loss and attention are the fast ones (``train.speed``).
        optimizer: As in the recipe.
        accumulation: Micro-batches of an optimizer step.
        dropout: Whether adapters drop inputs out.
        gpus: How many share the work.
        parallel: How.
    """

    shape: ModelShape
    method: str
    base: Base
    width: int
    rows: Rows
    targets: tuple[str, ...] = ()
    rank: int = 0
    keep: Keep = "everything"
    fused: bool = False
    optimizer: str = "adamw"
    accumulation: int = 1
    dropout: bool = False
    gpus: int = 1
    parallel: Parallel = "ddp"

    @property
    def numbers(self) -> Numbers:
        """In which formats a block computes."""
        full = self.method == "full"
        targets = () if full else self.targets
        return Numbers(self.width, targets, self.rank, full and self.width < FLOAT, self.dropout)

    @property
    def adapter_weights(self) -> int:
        """Trained weights of the adapters."""
        found = (
            size for name, size in self.shape.linears.items() if has_adapter(name, self.targets)
        )
        return self.shape.layers * self.rank * sum(o + i for o, i in found)

    @property
    def trained_weights(self) -> int:
        """Weights that the optimizer changes."""
        return self.shape.weights if self.method == "full" else self.adapter_weights


def weight_bytes(setup: Setup) -> float:
    """Of the base as it lies in memory; ``full`` keeps fp32 weights and rounds them while computing."""
    shape = setup.shape
    if setup.method == "full" or setup.base == "fp32":
        return FLOAT * shape.weights
    each = {"bf16": 2, "nf4": NF4_BYTES, "fp8": 2, "fp8_once": 1}[setup.base]
    scales = 0
    if setup.base.startswith("fp8"):  # one fp32 scale per row
        scales = FLOAT * shape.layers * sum(outputs for outputs, _ in shape.linears.values())
    if setup.base == "nf4" and setup.fused:  # scales are unpacked to fp32 beside the packed ones
        scales = FLOAT * shape.linear_weights // 64
    return each * shape.linear_weights + scales + setup.width * shape.other_weights


def held_bytes(setup: Setup) -> float:
    """Weights, adapter, optimizer states and gradients, held whole: what must fit whatever the batch."""
    trained = setup.trained_weights
    adapter = FLOAT * setup.adapter_weights if setup.method != "full" else 0
    return weight_bytes(setup) + adapter + (state_bytes(setup) + FLOAT) * trained


def state_bytes(setup: Setup) -> float:
    """Of the optimizer, for each trained weight."""
    return STATE_8BIT_BYTES if setup.optimizer == "adamw_8bit" else STATE_BYTES


def forecast(setup: Setup, gpu_bytes: int | None = None) -> Forecast:
    """What one GPU holds when most is alive."""
    ways = setup.gpus
    shared = SHARDED[setup.parallel] if ways > 1 else frozenset()
    held = {
        "weights": weight_bytes(setup) / (ways if "weights" in shared else 1),
        "adapter": FLOAT * setup.adapter_weights if setup.method != "full" else 0,
        "optimizer": state_bytes(setup)
        * setup.trained_weights
        / (ways if "optimizer" in shared else 1),
    }
    if "weights" in shared:  # a block is gathered while the one before it still computes
        block = weight_bytes(setup) * setup.shape.block_weights / setup.shape.weights
        held["gathered blocks"] = 2 * block
    gradients = FLOAT * setup.trained_weights / (ways if "gradients" in shared else 1)
    passing = max(moments(setup, gradients), key=lambda moment: sum(moment.values()))
    loose = fragmentation(setup, gradients, sum(passing.values()))
    passing["workspace"] = WORKSPACE_BYTES
    named = {**held, **passing, "fragmentation": loose, "CUDA context": float(CONTEXT_BYTES)}
    return Forecast(parts(**named), gpu_bytes)


def roomiest(setup: Setup, gpu_bytes: int | None) -> Setup:
    """The fast path with ``gradient_checkpointing: auto``: blocks keep as much as fits.

    Also a second copy of an FP8 base, where it fits beside the richest policy.
    """
    if not setup.fused or gpu_bytes is None:
        return setup
    twice = [replace(setup, keep="products", base="fp8")] if setup.base == "fp8_once" else []
    ways = [*twice, *(replace(setup, keep=keep) for keep in KEEPS)]
    return next((way for way in ways if forecast(way, gpu_bytes).fit is Fit.fits), setup)


def moments(setup: Setup, gradients: float) -> Iterator[dict[str, float]]:
    """What is alive besides weights and optimizer at each moment that may be the peak."""
    saved, again = kept_by_all(setup), recomputed(setup)
    before = gradients if setup.accumulation > 1 else 0.0  # those of the micro-batches before
    head = FLOAT * setup.shape.embedding_weights if setup.method == "full" else 0
    yield {"gradients": before, "activations": saved, "logits": logits_bytes(setup)}
    started = before or head
    yield {"gradients": started, "activations": saved + again + passing_bytes(setup)}
    rounded = setup.width * setup.shape.block_weights if setup.numbers.autocast else 0
    last = (
        kept_by_block(setup) + again - rounded + 2 * FLOAT * setup.shape.hidden * setup.rows.tokens
    )
    yield {"gradients": gradients, "activations": last}


def fragmentation(setup: Setup, gradients: float, passing: float) -> float:
    """Bytes that the allocator holds beyond what is allocated at the peak.

    Logits come in a few huge pieces, and what a block recomputes, and the gradients, in many small
    ones: neither finds room in what the other left, so the smaller of both is held besides. Gradients
    do find room where blocks kept much.
    """
    unlike = recomputed(setup) + max(0.0, gradients - kept_by_all(setup))
    unlike += passing_bytes(setup) if recomputed(setup) else 0
    return min(logits_bytes(setup), unlike) + LOOSE_SHARE * passing


def kept_by_block(setup: Setup, keep: Keep | None = None) -> int:
    """Bytes that one block keeps until its backward pass."""
    keep = keep or setup.keep
    if keep == "nothing":
        residual = FLOAT if setup.numbers.autocast else setup.width
        return residual * setup.shape.hidden * setup.rows.tokens
    if setup.fused:
        return kept_fused(setup.shape, setup.rows, setup.numbers, keep)
    return kept_plain(setup.shape, setup.rows, setup.numbers)


def kept_by_all(setup: Setup) -> float:
    """Bytes kept when the loss is known: by all blocks, by the last norm, rotations, ids, the mask."""
    shape, rows = setup.shape, setup.rows
    full = setup.method == "full"
    # the embeddings are frozen with adapters: then the first block's first norm keeps nothing
    first = 0 if full or setup.keep == "nothing" else -FLOAT * shape.hidden
    last_norm = FLOAT * shape.hidden * (2 if full else 1)
    rotation = 2 * (FLOAT if full else setup.width) * shape.head_dim
    ids = 2 * 8  # ids and positions: int64
    kept = shape.layers * kept_by_block(setup)
    if setup.numbers.autocast:
        kept += setup.width * shape.embedding_weights  # the output head, rounded by autocast
    return kept + rows.tokens * (first + last_norm + rotation + ids) + rows.mask


def recomputed(setup: Setup) -> int:
    """Bytes of a block that are alive again in its backward pass."""
    if setup.keep == "everything":
        return 0
    return max(0, kept_by_block(setup, "everything") - kept_by_block(setup))


def passing_bytes(setup: Setup) -> int:
    """Bytes that come and go in a block's backward pass, beyond what it kept."""
    shape, tokens = setup.shape, setup.rows.tokens
    dequantized = 0
    if setup.base == "nf4" and setup.method != "full":
        dequantized = setup.width * max((o * i for o, i in shape.linears.values()), default=0)
    if setup.fused:
        return tokens * setup.width * (2 * shape.intermediate + 2 * shape.hidden) + dequantized
    if setup.width == FLOAT:
        return tokens * 2 * FLOAT * shape.intermediate + dequantized
    if setup.keep == "everything":
        last_norm = 5 * FLOAT * shape.hidden
        return tokens * max(14 * shape.hidden + 2 * shape.intermediate, last_norm) + dequantized
    return tokens * (10 * shape.hidden + 4 * shape.intermediate) + dequantized


def logits_bytes(setup: Setup) -> int:
    """Bytes of the logits, at most."""
    shape, trained = setup.shape, setup.rows.trained
    if setup.fused:
        piece = min(PIECE, trained) * shape.vocabulary * PIECE_BYTES
        return piece + 2 * setup.width * trained * shape.hidden
    capped = setup.width if shape.capped else 0  # the tanh
    hidden = setup.width * shape.hidden if setup.method == "full" else 0  # its gradient needs it
    return trained * (shape.vocabulary * (LOGITS_BYTES + capped) + hidden)
