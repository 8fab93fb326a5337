"""GPUs that are cut into MIG devices: ``nvidia-smi --query-gpu`` says that they are, its other answers say how.

``nvidia-smi -L`` names the devices, ``nvidia-smi -q -x`` has their memory; GPU and index join the two.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping

from toolkit.errors import EngineError
from toolkit.serving.gpus import Gpu

NAMES = ("nvidia-smi", "-L")
MEMORY = ("nvidia-smi", "-q", "-x")
_GPU = re.compile(r"GPU (\d+): .*\(UUID: (GPU-[^)]+)\)")
_DEVICE = re.compile(r"\s+MIG .*Device\s+(\d+): \(UUID: (MIG-[^)]+)\)")


def devices(names: str, memory: str) -> dict[str, list[Gpu]]:
    """The MIG devices of each GPU that is cut, by its UUID.

    Args:
        names: The answer to :data:`NAMES`.
        memory: The answer to :data:`MEMORY`.

    Raises:
        EngineError: The two do not fit together.
    """
    known = dict(_named(names))
    try:
        found = list(_measured(memory, known))
    except (ET.ParseError, KeyError, ValueError, AttributeError) as error:
        raise EngineError(
            f"nvidia-smi does not say how the GPUs are cut into MIG devices: {error!r}",
            "compare `nvidia-smi -L` with `nvidia-smi -q -x`; without MIG: `nvidia-smi -mig 0`",
        ) from None
    cut: dict[str, list[Gpu]] = {}
    for whole, device in found:
        cut.setdefault(whole, []).append(device)
    return cut


def _named(text: str) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """(UUID of the GPU, index of the device) -> (index of the GPU, UUID of the device)."""
    index, whole = "", ""
    for line in text.splitlines():
        if found := _GPU.match(line):
            index, whole = found.groups()
        elif found := _DEVICE.match(line):
            yield (whole, found[1]), (index, found[2])


def _measured(
    text: str, known: Mapping[tuple[str, str], tuple[str, str]]
) -> Iterator[tuple[str, Gpu]]:
    for gpu in ET.fromstring(text).iter("gpu"):  # noqa: S314 - of a program of this machine
        whole = _text(gpu, "uuid")
        for number, device in enumerate(gpu.iterfind("mig_devices/mig_device")):
            index, uuid = known[whole, _text(device, "index")]
            instance = f"{_text(device, 'gpu_instance_id')}/{_text(device, 'compute_instance_id')}"
            # By number or by its own name a cut GPU is its first device: CUDA takes no other then.
            names = (f"MIG-{whole}/{instance}", *((index, whole) if number == 0 else ()))
            total, free = (_mib(device, kind) for kind in ("total", "free"))
            shown = f"{index} (MIG {_text(device, 'index')})"
            yield whole, Gpu(shown, uuid, total, free, names=names)


def _text(node: ET.Element, path: str) -> str:
    value = node.findtext(path)
    if value is None:
        raise KeyError(path)
    return value.strip()


def _mib(device: ET.Element, kind: str) -> int:
    """``40448 MiB``."""
    return int(_text(device, f"fb_memory_usage/{kind}").split()[0])
