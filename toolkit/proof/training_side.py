"""The ``reference.json`` of every folder that stages write: loads the model, lets the recorder ask it.

It runs within those stages; torch and transformers are imported inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.proof.recorder import Recorder
from toolkit.proof.reference import Kind, Reference

if TYPE_CHECKING:
    from toolkit.train.model import Precision

USED = 0.8
"""Share of the free memory that a model may take."""
LOAD_ERRORS = (ValueError, ImportError, OSError, RuntimeError, KeyError)
"""Not a causal language model, packed in a way that transformers cannot read here, or no adapter of this base."""


def of_base(folder: Path, device: str, *, trust_remote_code: bool = False) -> Reference:
    """Write the reference of a base as it was fetched."""
    return _of_complete(folder, "base", None, device, trust_remote_code=trust_remote_code)


def of_model(
    folder: Path, *, dataset: Path | None, device: str, trust_remote_code: bool = False
) -> Reference:
    """Write the reference of a complete model whose weights were all trained."""
    return _of_complete(folder, "model", dataset, device, trust_remote_code=trust_remote_code)


def _of_complete(
    folder: Path, kind: Kind, dataset: Path | None, device: str, *, trust_remote_code: bool
) -> Reference:
    from toolkit.evaluation.loading import release

    recorder = Recorder(folder, dataset, trust_remote_code=trust_remote_code)
    precision = "fp32"
    model, recorder.not_scored = _loaded(folder, device, trust_remote_code=trust_remote_code)
    if model is not None:
        precision = precision_of(model)
        recorder.score("model", model)
    del model
    reference = recorder.write(folder, kind, precision=precision)
    release(device)
    return reference


def of_adapter(
    output: Path,
    base: Path,
    *,
    facts: Mapping[str, Any],
    dataset: Path | None,
    device: str,
    trust_remote_code: bool = False,
) -> Reference:
    """Write the reference of an adapter folder: base alone, base and adapter, and known mistakes.

    Args:
        output: The adapter's folder, complete but for the reference.
        base: Folder of its base.
        facts: What training said: ``trained_on`` and ``precision``.
        dataset: Folder of the dataset artifact, if there is one.
        device: ``cpu`` or ``cuda``.
        trust_remote_code: Run Python code that lies in ``base``.
    """
    from peft import PeftModel

    from toolkit.evaluation.loading import release
    from toolkit.models.fp8 import round_layers
    from toolkit.proof.faults import faults
    from toolkit.train.model import Numerics, load_base

    recorder = Recorder(base, dataset, trust_remote_code=trust_remote_code)
    trained_on = facts.get("trained_on")
    exact = _fits_exact(base, device)
    precision: Precision = "fp32" if exact else facts.get("precision", "bf16")
    numerics = Numerics(precision, trained_on == "nf4")
    model = load_base(base, numerics, device, trust_remote_code=trust_remote_code)
    if trained_on == "fp8":
        round_layers(model, facts["targets"])
    recorder.score("beside", model)
    adapted = PeftModel.from_pretrained(model, str(output))
    recorder.score("model", adapted)
    for name in faults(adapted):
        recorder.score(name, adapted)
    del model, adapted
    release(device)
    return recorder.write(output, "adapter", precision=precision, trained_on=trained_on, base=base)


def of_foreign_adapter(
    output: Path,
    base: Path,
    *,
    dataset: Path | None,
    device: str,
    trust_remote_code: bool = False,
) -> Reference:
    """Write the reference of an adapter that was trained elsewhere, on the base that it is served on.

    Where transformers or PEFT cannot load it, ``not_scored`` says why, and conversations alone are stored. That it was
    trained on this base is the user's word.
    """
    why = _too_large(base, device)
    if why is None:
        try:
            return of_adapter(
                output,
                base,
                facts={},
                dataset=dataset,
                device=device,
                trust_remote_code=trust_remote_code,
            )
        except (*LOAD_ERRORS, TypeError) as error:
            why = f"it cannot be loaded here: {(str(error).splitlines() or [repr(error)])[0][:200]}"
    recorder = Recorder(base, dataset, trust_remote_code=trust_remote_code)
    recorder.not_scored = why
    return recorder.write(output, "adapter", precision="fp32", base=base)


def precision_of(model: Any) -> str:
    """In what a loaded model computes: ``bf16``, ``fp16`` or ``fp32``."""
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(model.dtype), "fp32")


def _loaded(
    folder: Path, device: str, *, trust_remote_code: bool
) -> tuple[Any, None] | tuple[None, str]:
    """The model, or why the training side has no word on it."""
    from toolkit.evaluation.loading import load_model

    if problem := _too_large(folder, device):
        return None, problem
    try:
        exact = _fits_exact(folder, device)
        return load_model(folder, device, exact=exact, trust_remote_code=trust_remote_code), None
    except LOAD_ERRORS as error:
        return None, f"transformers cannot load it here: {str(error).splitlines()[0][:200]}"


def _too_large(folder: Path, device: str) -> str | None:
    need, free = _memory(folder, device)
    if need <= free * USED:
        return None
    shown = f"{need / 2**30:.0f} GiB of {free / 2**30:.0f} GiB"
    return f"it needs {shown} that are free on the {device}"


def _fits_exact(folder: Path, device: str) -> bool:
    """Whether a model can compute in fp32 here, as it always does on a CPU.

    On a GPU the bf16 forward of Transformers was measured to be off by 0.05 to 0.11 nats a token, as far as an engine
    is: beside it a fault of the engine shows half as clearly.
    """
    from toolkit.evaluation.loading import quantization_method

    if device == "cpu":
        return True
    method = quantization_method(folder)
    if method not in (None, "compressed-tensors"):
        return False  # kernels of packed weights compute in 16 bits
    need, free = _memory(folder, device)
    return need * (2 if method is None else 8) <= free * USED  # packed: four bits at worst


def _memory(folder: Path, device: str) -> tuple[float, float]:
    """Bytes that a model needs as it is loaded by default, and bytes that are free."""
    import torch

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if device == "cuda":
        return size * 1.1, float(torch.cuda.mem_get_info()[0])
    return size * 2.2, _available_memory()  # bf16 on disk, fp32 in memory


def _available_memory() -> float:
    """Bytes that Linux would give without swapping; no limit where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    found = next((line for line in lines if line.startswith("MemAvailable")), None)
    return float(found.split()[1]) * 1024 if found else float("inf")
