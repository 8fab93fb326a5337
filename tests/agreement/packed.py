"""An adapter on 4-bit weights, beside the same adapter on the same weights unpacked: the engine gives one answer.

Imported by ``ask_vllm.py`` in the interpreter of the engine; nothing of the toolkit is.
"""

import json
import shutil
from pathlib import Path

GROUP, BITS = 32, 4
SETTINGS = {
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


def write(base: Path, folder: Path) -> dict[str, Path]:
    """``packed`` (W4A16, as compressed-tensors writes it) and ``unpacked`` (the same numbers) beside each other."""
    from safetensors.torch import load_file, save_file

    packed, unpacked = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            packed[name] = unpacked[name] = tensor.float()
            continue
        parts, unpacked[name] = quantized(tensor.float())
        packed |= {name.replace("weight", f"weight_{part}"): v for part, v in parts.items()}
    made = {"packed": packed, "unpacked": unpacked}
    for name, tensors in made.items():
        shutil.copytree(base, folder / name)
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(whole, folder / name / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": SETTINGS}
    (folder / "packed" / "config.json").write_text(json.dumps(config))
    return {name: folder / name for name in made}


def quantized(weight):
    """Rounded to the nearest; the tensors of a layer by their ending, and the numbers that they stand for."""
    import torch

    groups = weight.reshape(weight.shape[0], -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    values = (groups / scale).round().clamp(-8, 7)
    shifted = values.reshape(weight.shape).to(torch.int32) + 8
    words = torch.zeros(weight.shape[0], weight.shape[1] * BITS // 32, dtype=torch.int32)
    for place in range(32 // BITS):
        words |= shifted[:, place :: 32 // BITS] << (BITS * place)
    parts = {"packed": words, "scale": scale[..., 0], "shape": torch.tensor(weight.shape)}
    return parts, (values * scale).reshape(weight.shape)
