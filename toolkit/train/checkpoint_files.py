"""The files of a checkpoint: whole and on the disk, or an error that says which one is not.

Both kinds of checkpoints (``checkpoint.py``, ``trainer.py``) keep the sizes of their files in the one
that is written last. A file that was cut off, or is gone, is then found before a model is loaded.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from toolkit.errors import ArtifactError, StepFailedError


def flush(folder: Path) -> None:
    """Bring all bytes to the disk, so that a power cut after the rename leaves nothing hollow."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def insist_on(checkpoint: Path, wanted: Mapping[str, int]) -> None:
    """Refuse a checkpoint with a file that is gone or has another size.

    Raises:
        ArtifactError: There is one.
    """
    found = sizes(checkpoint)
    for name, size in wanted.items():
        if name not in found:
            raise unusable(checkpoint, f"{name} is not there")
        if found[name] != size:
            raise unusable(
                checkpoint, f"{name} has {found[name]} bytes and was written with {size}"
            )


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Any way in which a damaged file shows itself is the same error.

    Raises:
        ArtifactError: A file is damaged.
    """
    try:
        yield
    except damage() as error:
        raise unusable(checkpoint, f"{error}".partition("\n")[0]) from error


def damage() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    from safetensors import SafetensorError

    return (
        *(OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError),
        *(pickle.UnpicklingError, SafetensorError),
    )


def unusable(checkpoint: Path, why: str) -> ArtifactError:
    """The error, with what to do."""
    return ArtifactError(
        f"checkpoint {checkpoint} cannot be used: {why}",
        f"remove it to go on from an older checkpoint, or {checkpoint.parent} to start anew",
    )


@contextmanager
def writing(folder: Path, step: int, newest: Path | None) -> Iterator[None]:
    """A disk that is full is no crash: what is complete stays, and is named.

    Args:
        folder: Where the checkpoint goes.
        step: Optimizer steps done.
        newest: The complete checkpoint before it.

    Raises:
        StepFailedError: It cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch says a full disk by a RuntimeError; others of that type are not about files
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        then = f"from {newest.name}, which is complete" if newest else "from the start"
        raise StepFailedError(
            f"the checkpoint of step {step} cannot be written to {folder}: "
            f"{str(error).partition(chr(10))[0]}",
            f"make room there and run the same command again: it goes on {then}",
        ) from error
