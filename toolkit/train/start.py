"""Adapters that do not start at zero: PiSSA takes the base's largest directions, LoftQ what 4 bits lost.

A and B as they were before the first step are kept beside the training state and in the artifact. A resumed run
rebuilds the same base from them, whatever its singular vectors would come to on that machine; export subtracts them.

Legend: O outputs and I inputs of a linear layer, r rank.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from toolkit.errors import ArtifactError
from toolkit.recipe.train import LoraSection

if TYPE_CHECKING:
    import torch

Matrices: TypeAlias = "dict[str, torch.Tensor]"

FILE = "start_adapter.safetensors"
"""A [r, I] and B [O, r] of every layer, named as in ``adapter_model.safetensors``."""

PREFIX = "base_model.model."


def start_file(state: Path, *, resume: bool) -> Path:
    """Where a run keeps its start; one that does not go on from an older run has none yet."""
    file = state / FILE
    if not resume and not _rank():
        file.unlink(missing_ok=True)
    return file


@contextmanager
def first_alone() -> Iterator[None]:
    """Of several training processes the first one goes in, makes the start and keeps it; then the others."""
    import torch

    rank = _rank()
    if rank:
        torch.distributed.barrier()
    yield
    if rank == 0:
        torch.distributed.barrier()


def _rank() -> int | None:
    """Of this process among several; None where it is the only one."""
    import torch

    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if several else None


def found(folder: Path) -> Matrices | None:
    """The start that a folder holds, if its adapter did not start at zero."""
    file = folder / FILE
    return read(file) if file.is_file() else None


def keep(state: Path, output: Path) -> None:
    """Copy the start of a finished run into its artifact."""
    if (state / FILE).is_file():
        shutil.copyfile(state / FILE, output / FILE)


def is_pissa(settings: Any) -> bool:
    """Whether a PEFT config names an adapter that took a part of its base into itself."""
    return str(settings.init_lora_weights).startswith("pissa")


def scale_of(settings: Any) -> float:
    """What B A is multiplied by, from a PEFT config without patterns of ranks."""
    divisor = sqrt(settings.r) if settings.use_rslora else settings.r
    return float(settings.lora_alpha / divisor)


def matrices(adapted: Any) -> dict[str, Any]:
    """The parameters A and B of a PEFT model, by their names in ``adapter_model.safetensors``."""
    return {
        name.replace(".default.", "."): weight
        for name, weight in adapted.named_parameters()
        if ".lora_A.default." in name or ".lora_B.default." in name
    }


def begin(adapted: Any, lora: LoraSection, base: Path, kept: Path | None) -> None:
    """Give an adapter on its base the start of the recipe, or that of an interrupted run.

    With ``pissa`` and no start kept, PEFT has given it already.

    Args:
        adapted: A PEFT model.
        lora: Its ``init`` is not ``default``.
        base: Folder with the weights as they were before quantization.
        kept: Where the start is kept; read if it is there, else written.

    Raises:
        ArtifactError: The kept start is damaged or of another adapter.
        PreflightError: ``loftq``, and the base's files name their weights otherwise than the model does.
    """
    if kept is not None and kept.is_file():
        start = read(kept)
        _check(start, matrices(adapted), kept)
        if lora.is_pissa:
            subtract(adapted, start, scale_of(adapted.peft_config["default"]))
        put(adapted, start)
        return
    if lora.init == "loftq":
        from toolkit.train.loftq import lost_by_rounding

        put(adapted, lost_by_rounding(adapted, base))
    if kept is not None:
        write(kept, adapted)


def read(file: Path) -> Matrices:
    """A and B before the first step.

    Raises:
        ArtifactError: The file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        start: Matrices = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}", _anew(file)) from error
    return start


def write(file: Path, adapted: Any) -> None:
    """Keep A and B, whole or not at all."""
    from safetensors.torch import save_file

    part = file.with_suffix(f".{os.getpid()}.part")
    save_file({name: w.detach().contiguous() for name, w in matrices(adapted).items()}, part)
    part.rename(file)


def put(adapted: Any, start: Matrices) -> None:
    """Copy A and B into a PEFT model."""
    import torch

    with torch.no_grad():
        for name, weight in matrices(adapted).items():
            weight.copy_(start[name])


@contextmanager
def restored(adapted: Any, start: Matrices) -> Iterator[None]:
    """While entered, the adapter is as it was before the first step."""
    trained = {name: weight.detach().clone() for name, weight in matrices(adapted).items()}
    put(adapted, start)
    try:
        yield
    finally:
        put(adapted, trained)


def subtract(model: Any, start: Matrices, scale: float) -> None:
    """Leave the base with W - scale B A, rounded to its own type as PEFT does when PiSSA starts.

    Args:
        model: A base, or a PEFT model on it.
        start: A and B before the first step.
        scale: See :func:`scale_of`.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module, a, b in pairs(start):
        layer = base.get_submodule(module)
        layer = getattr(layer, "base_layer", layer)
        weight = layer.weight.data  # [O, I]
        place = {"device": weight.device, "dtype": torch.float32}
        taken = scale * b.to(**place) @ a.to(**place)
        layer.weight.data = (weight.to(torch.float32) - taken).to(weight.dtype)


def load_adapter(model: Any, folder: Path) -> Any:
    """The trained adapter on a base as it was loaded, its start subtracted where it was PiSSA's.

    PEFT would look for the singular vectors anew and find others.

    Args:
        model: From :func:`toolkit.train.model.load_base`, in the number format of training.
        folder: What training wrote.
    """
    from peft import LoraConfig, PeftModel

    settings = LoraConfig.from_pretrained(str(folder))
    if is_pissa(settings):
        subtract(model, read(folder / FILE), scale_of(settings))
        settings.init_lora_weights = True
    return PeftModel.from_pretrained(model, str(folder), config=settings)


def pairs(start: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name of each layer in the base, its A [r, I] and its B [O, r]."""
    for name, a in start.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            yield module.removeprefix(PREFIX), a, start[f"{module}.lora_B.weight"]


def named(module: str, b: torch.Tensor, a: torch.Tensor) -> Matrices:
    """B [O, r] and A [r, I] of a layer, as an adapter's file names them."""
    return {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}


def _check(start: Matrices, wanted: Mapping[str, Any], file: Path) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in wanted.items()}
    if shapes != {name: tuple(weight.shape) for name, weight in start.items()}:
        raise ArtifactError(f"{file} is the start of another adapter", _anew(file))


def _anew(file: Path) -> str:
    return f"remove {file.parent} and train anew"
