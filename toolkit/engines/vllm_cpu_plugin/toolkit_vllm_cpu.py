"""Two repairs of vLLM on a CPU, 0.32.0.

**Adapters leak into the base's answers.** A token without an adapter has the index -1, which its LoRA operations on a
CPU (``vllm/lora/ops/torch_ops``) read as the last slot: a request for the base that is batched with one for an adapter
is answered with the adapter in that slot. ``toolkit.proof`` found it: 1.3 nats between alone and in a batch.

**4- and 8-bit integer weights without AVX-512** are dequantized once, when they are loaded. vLLM's build for such CPUs
lacks the kernel ``cpu_gemm_wna16`` (its ``_C_AVX2`` library), but its kernel choice does not know: the model loads, and
the first request dies with "'_C' object has no attribute 'cpu_gemm_wna16'".

This folder goes on the engine's ``PYTHONPATH``; vLLM finds the entry point and calls :func:`register` in every process.
It imports nothing of the toolkit, since it runs in the engine's environment.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Keep adapters out of other requests, and put the dequantizing kernel first where the packed one is missing."""
    import torch
    from vllm.platforms import PlatformEnum, current_platform

    if not current_platform.is_cpu():
        return
    keep_adapters_apart()
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return
    from vllm.model_executor.kernels import linear

    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if all(kernel.__name__ != "DequantizedLinearKernel" for kernel in kernels):
        kernels.insert(0, _kernel())


def keep_adapters_apart() -> None:
    """Make the first of the two LoRA products zero for tokens without an adapter, so that the second adds nothing."""
    import sys

    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops

    plain = lora_ops.bgmv_shrink
    if getattr(plain, "keeps_apart", False):
        return

    def bgmv_shrink(
        inputs: Any, weights: Any, output_tensor: Any, indices: Any, scaling: float = 1.0
    ) -> None:
        plain(inputs, weights, output_tensor, indices, scaling)
        output_tensor.masked_fill_((indices < 0).unsqueeze(-1), 0)

    bgmv_shrink.keeps_apart = True  # type: ignore[attr-defined]
    user = sys.modules.get("vllm.lora.punica_wrapper.punica_cpu")
    for module in filter(None, (lora_ops, torch_ops, user)):
        module.bgmv_shrink = bgmv_shrink


def _kernel() -> Any:
    import torch
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.scalar_type import scalar_types

    base: Any = MPLinearKernel
    symmetric = (scalar_types.uint4b8, scalar_types.uint8b128)

    class DequantizedLinearKernel(base):  # type: ignore[misc]  # the engine is not here to be checked
        """As exact as the packed kernel, and as large and as fast as the full model."""

        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            known = (scalar_types.uint4,) if c.zero_points else symmetric
            if c.weight_type not in known:
                return False, f"{c.weight_type} is not a 4- or 8-bit integer that is known here"
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            packed = getattr(layer, self.w_q_name)  # [out, in / values per int32]
            scales = getattr(layer, self.w_s_name)  # [out, groups]
            bits = self.config.weight_type.size_bits
            weight = unpack(packed.data, bits, packed.packed_dim)
            if packed.input_dim == 0:
                weight = weight.t()
            by_output = scales.data if scales.output_dim == 0 else scales.data.t()
            width = weight.shape[1] // by_output.shape[1]
            full = weight.to(torch.float32)
            used = [self.w_q_name, self.w_s_name]
            if self.config.zero_points:
                zeros = getattr(
                    layer, self.w_zp_name
                )  # [out / values per int32, groups], or turned round
                points = unpack(zeros.data, bits, zeros.packed_dim)
                points = points if zeros.output_dim == 0 else points.t()
                full -= points.to(torch.float32).repeat_interleave(width, 1)
                used.append(self.w_zp_name)
            full *= by_output.to(torch.float32).repeat_interleave(width, 1)
            layer.weight = torch.nn.Parameter(
                full.to(self.config.act_type).contiguous(), requires_grad=False
            )
            for name in used:
                getattr(layer, name).data = torch.empty(0)
            dispatch_cpu_unquantized_gemm(layer, remove_weight=True)

        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            return layer.cpu_linear(x, layer.weight, bias)

    return DequantizedLinearKernel


def unpack(packed: Any, bits: int, dim: int) -> Any:
    """Signed integers from int32 words that hold 32 / bits of them along ``dim``, the lowest bits first."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    words = packed.movedim(dim, -1).unsqueeze(-1)  # [..., words, 1]
    values = ((words >> shifts) & (2**bits - 1)) - 2 ** (bits - 1)
    return values.flatten(-2).movedim(-1, dim)
