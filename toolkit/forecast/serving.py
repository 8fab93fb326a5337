"""How much GPU memory serving takes: bytes in, bytes out. Pure.

Where the numbers come from:

- KV cache: two vectors of ``kv_heads * head_dim`` per layer and token (vLLM,
  v1/kv_cache_interface.py: FullAttentionSpec); heads are shared out over tensor-parallel GPUs, at
  least one each.
- LoRA slots: for each linear layer ``rank * (inputs + outputs)`` weights per slot, whether an
  adapter uses the layer or not (vLLM, lora/layers/base_linear.py: create_lora_weights).
- What is left for the KV cache: ``fraction * memory - weights - slots - activations - the rest``
  (vLLM, v1/worker/gpu_worker.py: determine_available_memory).
- Activations and the rest are estimates: the widest layer for one batch of tokens, logits in
  fp32, and :data:`RESERVE_BYTES` for the CUDA context and graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.forecast import parts
from toolkit.forecast.parts import GIB, Fit
from toolkit.forecast.shape import ModelShape

RESERVE_BYTES = GIB
"""CUDA context, NCCL, graphs: about 1 GiB on an H100."""

BATCHED_TOKENS = 8192
"""Tokens in one forward pass while prompts are read (vLLM on an H100; 2048 on smaller GPUs)."""


@dataclass(frozen=True)
class Ask:
    """What is asked of one GPU.

    Attributes:
        weight_bytes: Of the whole model.
        gpu_bytes: Memory of one GPU.
        fraction: Share of it that the engine may take.
        context: Tokens of the longest request.
        concurrent: Requests decoded together.
        slots: LoRA slots; 0 without adapters.
        rank: Rank of each slot.
        tensor_parallel: GPUs that share the model.
        kv_bytes: Bytes of one number in the KV cache: 2, or 1 with FP8.
    """

    weight_bytes: int
    gpu_bytes: int
    fraction: float
    context: int
    concurrent: int
    slots: int = 0
    rank: int = 0
    tensor_parallel: int = 1
    kv_bytes: int = 2


@dataclass(frozen=True)
class Forecast:
    """Bytes on one GPU."""

    budget: int
    """What the engine may take."""
    weights: int
    slots: int
    activations: int
    per_token: int
    """KV cache of one token."""
    context: int
    """KV cache of one request of full length."""

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.weights + self.slots + self.activations + RESERVE_BYTES

    @property
    def room(self) -> int:
        """What is left for the KV cache; negative when even the weights do not fit."""
        return self.budget - self.fixed

    @property
    def tokens(self) -> int:
        """Tokens that fit into the KV cache."""
        return max(0, self.room // self.per_token)

    @property
    def fits(self) -> bool:
        """Whether one request of full length fits: engines do not start with less."""
        return self.room >= self.context


def kv_bytes_per_token(shape: ModelShape, *, tensor_parallel: int = 1, bytes_each: int = 2) -> int:
    """Bytes of KV cache that one token takes on one GPU."""
    heads = max(1, shape.kv_heads // tensor_parallel)
    return 2 * shape.layers * heads * shape.head_dim * bytes_each


def slot_bytes(shape: ModelShape, rank: int, *, tensor_parallel: int = 1) -> int:
    """Bytes of one LoRA slot on one GPU, in bf16: ``lora_A`` whole, ``lora_B`` shared out."""
    per_layer = sum(
        inputs + outputs // tensor_parallel for outputs, inputs in shape.linears.values()
    )
    return 2 * rank * shape.layers * per_layer


def forecast(shape: ModelShape, ask: Ask) -> Forecast:
    """What one GPU holds."""
    ways = ask.tensor_parallel
    tokens = min(BATCHED_TOKENS, max(ask.context, ask.concurrent) * ask.concurrent)
    widest = 3 * shape.intermediate // ways + 4 * shape.hidden
    logits = 2 * 4 * shape.vocabulary * min(ask.concurrent, tokens)
    per_token = kv_bytes_per_token(shape, tensor_parallel=ways, bytes_each=ask.kv_bytes)
    return Forecast(
        budget=int(ask.fraction * ask.gpu_bytes),
        weights=ask.weight_bytes // ways,
        slots=ask.slots * slot_bytes(shape, ask.rank, tensor_parallel=ways),
        activations=2 * tokens * widest + logits,
        per_token=per_token,
        context=per_token * ask.context,
    )


def held_against(now: Forecast, ask: Ask) -> tuple[parts.Forecast, Fit]:
    """The same as parts, with the KV cache that is asked for, and whether that much is there.

    ``tight`` means that fewer requests than asked for are decoded together; the others wait.
    """
    wanted = now.per_token * ask.context * ask.concurrent
    named = parts.parts(
        weights=now.weights,
        LoRA_slots=now.slots,
        activations=now.activations,
        KV_cache=wanted,
        engine=RESERVE_BYTES,
    )
    enough = now.tokens >= ask.context * ask.concurrent
    fit = (Fit.fits if enough else Fit.tight) if now.fits else Fit.too_large
    return parts.Forecast(named, ask.gpu_bytes, now.budget), fit
