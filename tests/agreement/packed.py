"""An adapter on 4-bit weights, beside the same adapter on the same weights unpacked: the engine gives one answer.

Imported by ``ask_vllm.py`` in the interpreter of the engine; nothing of the toolkit is.
"""

import json
import shutil
from pathlib import Path

GROUP, BITS = 32, 4
PER_WORD = 32 // BITS
ZERO = 8
TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group",
                "group_size": GROUP, "dynamic": False,
            },
        }
    },
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": BITS, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {
    "quant_method": "awq",
    "bits": BITS,
    "group_size": GROUP,
    "zero_point": True,
    "version": "gemm",
}
SETTINGS = {"tensors": TENSORS, "gptq": GPTQ, "awq": AWQ}
"""``quantization_config`` of each format."""


def write(base: Path, folder: Path) -> dict[str, Path]:
    """A folder for each format of :data:`SETTINGS`, and ``unpacked``: the same numbers, in all of them."""
    from safetensors.torch import load_file, save_file

    made = {name: {} for name in (*SETTINGS, "unpacked")}
    for name, tensor in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            for tensors in made.values():
                tensors[name] = tensor.float()
            continue
        values, scale = quantized(tensor.float())
        made["unpacked"][name] = (values * scale).reshape(tensor.shape)
        for kind, pack in (("tensors", as_tensors), ("gptq", as_gptq), ("awq", as_awq)):
            layer = name.removesuffix("weight")
            parts = pack(values.reshape(tensor.shape).int(), scale[..., 0])
            made[kind] |= {layer + part: value for part, value in parts.items()}
    for name, tensors in made.items():
        shutil.copytree(base, folder / name)
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(whole, folder / name / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((base / "config.json").read_text())
        if name in SETTINGS:
            config["quantization_config"] = SETTINGS[name]
        (folder / name / "config.json").write_text(json.dumps(config))
    return {name: folder / name for name in made}


def quantized(weight):
    """Rounded to the nearest: whole numbers from -7 to 7 [out, groups, GROUP], and the scale of each group.

    Scales are powers of two, so that what the numbers stand for is exact in 16 bits.
    """
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).log2().ceil().exp2()
    return (groups / scale).round().clamp(-7, 7), scale


def as_tensors(values, scale):
    """As compressed-tensors writes it: words along the inputs, no zero points."""
    import torch

    words = packed(values + ZERO, dim=1)
    return {
        "weight_packed": words,
        "weight_scale": scale,
        "weight_shape": torch.tensor(values.shape),
    }


def as_gptq(values, scale):
    """As AutoGPTQ writes it: turned round, words along the inputs, zero points less one."""
    import torch

    zeros = torch.full_like(scale.T, ZERO - 1, dtype=torch.int32)
    which = torch.arange(values.shape[1], dtype=torch.int32) // GROUP
    parts = {"qweight": packed(values.T + ZERO, dim=0), "qzeros": packed(zeros, dim=1)}
    return parts | {"scales": scale.T, "g_idx": which}


def as_awq(values, scale):
    """As AutoAWQ writes it: turned round, words along the outputs in an order of its own, zero points by group."""
    import torch

    zeros = (
        ZERO - torch.arange(scale.numel(), dtype=torch.int32).reshape(scale.T.shape) % 2
    )  # 8, 7, 8, ...
    shifted = values.T + zeros.repeat_interleave(GROUP, 0)
    return {
        "qweight": packed(mixed(shifted), dim=1),
        "qzeros": packed(mixed(zeros), dim=1),
        "scales": scale.T,
    }


def mixed(values):
    """The order in which AWQ puts eight numbers into a word."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return values.reshape(values.shape[0], -1, PER_WORD)[:, :, order].reshape(values.shape)


def packed(values, dim):
    """Words of 32 bits that hold eight numbers from 0 to 15 along ``dim``, the lowest bits first."""
    import torch

    values = values.movedim(dim, -1).to(torch.int32)
    words = torch.zeros(*values.shape[:-1], values.shape[-1] // PER_WORD, dtype=torch.int32)
    for place in range(PER_WORD):
        words |= values[..., place::PER_WORD] << (BITS * place)
    return words.movedim(-1, dim)
