"""GPUs in MIG mode: what ``nvidia-smi`` says of them, and how ``CUDA_VISIBLE_DEVICES`` names their parts.

Its answers are as NVIDIA documents them and as others report them (vllm#41850); there was no such GPU to ask.
"""

import os
from pathlib import Path

import pytest

from toolkit.errors import EngineError
from toolkit.serving import gpus, mig

WHOLE = "GPU-7f57f032-34ab-a064-c37c-7a4f75601cc5"
LARGE, SMALL = (
    "MIG-377e0049-554c-540b-93c6-d0976f8426cb",
    "MIG-f39aa248-6f1b-5769-b119-8d650bb34b27",
)
OTHER = "GPU-8c7c9c30-f12f-20bf-e14e-d3c4c965af32"
ROWS = f"""0, {WHOLE}, [Insufficient Permissions], [Insufficient Permissions], Enabled
1, {OTHER}, 81559, 81040, Disabled
"""
NAMES = f"""GPU 0: NVIDIA H100 80GB HBM3 (UUID: {WHOLE})
  MIG 2g.20gb     Device  0: (UUID: {LARGE})
  MIG 1c.1g.10gb  Device  1: (UUID: {SMALL})
GPU 1: NVIDIA H100 80GB HBM3 (UUID: {OTHER})
"""


def device(index: int, instance: int, total: int, free: int) -> str:
    return f"""<mig_device><index>{index}</index><gpu_instance_id>{instance}</gpu_instance_id>
        <compute_instance_id>0</compute_instance_id><fb_memory_usage><total>{total} MiB</total>
        <reserved>0 MiB</reserved><used>9 MiB</used><free>{free} MiB</free></fb_memory_usage></mig_device>"""


MEMORY = f"""<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log><attached_gpus>2</attached_gpus>
  <gpu id="00000000:15:00.0"><mig_mode><current_mig>Enabled</current_mig></mig_mode>
    <mig_devices>{device(0, 3, 20096, 19000)}{device(1, 9, 9856, 9800)}</mig_devices>
    <uuid>{WHOLE}</uuid></gpu>
  <gpu id="00000000:16:00.0"><mig_devices>None</mig_devices><uuid>{OTHER}</uuid></gpu>
</nvidia_smi_log>
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose ``nvidia-smi`` is a script."""
    answers = {"-L": NAMES, "-q": MEMORY, "--query-gpu*": ROWS}
    cases = ""
    for pattern, text in answers.items():
        file = tmp_path / f"answer{pattern.strip('*')}"
        file.write_text(text)
        cases += f'{pattern}) cat "{file}";;\n'
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncase "$1" in\n{cases}esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_a_gpu_that_is_cut_is_its_devices(machine: Path):
    large, small, other = gpus.query()
    assert (large.uuid, large.index, large.total_mib, large.free_mib) == (
        LARGE,
        "0 (MIG 0)",
        20096,
        19000,
    )
    assert (small.uuid, small.total_mib, small.is_part) == (SMALL, 9856, True)
    assert (other.uuid, other.total_mib, other.is_part) == (OTHER, 81559, False)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (LARGE, [LARGE]),
        (f"{SMALL},{LARGE}", [SMALL, LARGE]),
        ("MIG-f39aa248", [SMALL]),
        (f"MIG-{WHOLE}/9/0", [SMALL]),
        ("0", [LARGE]),
        (WHOLE, [LARGE]),
        ("GPU-8c7c9c30", [OTHER]),
        ("1,0", [OTHER, LARGE]),
        ("MIG-nowhere", []),
        (None, [LARGE, SMALL, OTHER]),
    ],
)
def test_every_name_that_cuda_knows_is_known(machine: Path, given, found):
    environ = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    assert [gpu.uuid for gpu in gpus.visible(gpus.query(), environ)] == found


def test_room_on_a_device_is_that_of_the_device(machine: Path):
    small = gpus.visible(gpus.query(), {"CUDA_VISIBLE_DEVICES": SMALL})
    with pytest.raises(EngineError, match=r"GPU 0 \(MIG 1\) has 9.6 of 9.6 GiB free") as e:
        gpus.room(small, 0.9, 16_000, free_at_start=True)
    assert "CUDA_VISIBLE_DEVICES" in e.value.hint


def test_an_engine_takes_one_device(machine: Path):
    found = gpus.query()
    assert [part[0].uuid for part in gpus.slices(found, 2, 1)] == [LARGE, SMALL]
    with pytest.raises(EngineError, match=r"on 2 GPUs cannot have GPU 0 \(MIG 0\)") as e:
        gpus.slices(found, 1, 2)
    assert "serve.tensor_parallel" in e.value.hint
    whole = gpus.visible(found, {"CUDA_VISIBLE_DEVICES": "1"})
    with pytest.raises(EngineError, match="but 1 is visible"):
        gpus.slices(whole, 1, 2)


@pytest.mark.parametrize(
    ("names", "memory"),
    [
        ("", MEMORY),
        (NAMES, "no XML"),
        (NAMES, MEMORY.replace("<total>9856 MiB</total>", "")),
        (NAMES, MEMORY.replace("20096 MiB", "[N/A]")),
        (NAMES.replace("Device  1", "Device  2"), MEMORY),
    ],
)
def test_answers_that_do_not_fit_together_are_an_error(names, memory):
    with pytest.raises(EngineError, match="does not say how the GPUs are cut") as e:
        mig.devices(names, memory)
    assert "nvidia-smi -L" in e.value.hint
