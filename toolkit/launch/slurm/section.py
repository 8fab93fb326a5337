"""What a profile says of Slurm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from toolkit.recipe.base import Section
from toolkit.registry import close_match

OURS = (
    "array", "begin-after", "chdir", "clusters", "comment", "dependency", "error", "export", "export-file", "help",
    "input", "job-name", "kill-on-invalid-dep", "nodes", "no-requeue", "ntasks", "ntasks-per-node", "open-mode",
    "output", "parsable", "quiet", "requeue", "signal", "test-only", "time", "usage", "version", "wait", "wrap",
)  # fmt: skip
"""Options of sbatch that the toolkit sets, or without which it works in another way."""


def one_line(value: str) -> str:
    """``value`` where it fits into one line of a script; raises ValueError where not."""
    if not value or any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise ValueError(f"{value!r} must be one line of text")
    return value


def option(value: str) -> str:
    """``value`` where it is a long option of sbatch that is not ours; raises ValueError where not."""
    one_line(value)
    name = value.removeprefix("--").partition("=")[0]
    if not value.startswith("--") or not name or " " in name:
        raise ValueError(
            f"{value!r} is no long option of sbatch: write it as --name=value or --name"
        )
    if name in OURS:
        raise ValueError(
            f"--{name} is set by the toolkit{close_match(name, ('partition', 'time'))};"
            " resources and time limit stand under resources"
        )
    return value


Line = Annotated[str, AfterValidator(one_line)]
Option = Annotated[str, AfterValidator(option)]


class ContainerSection(Section):
    """An image that the job's program runs in; the batch script itself runs on the node."""

    engine: Literal["pyxis", "apptainer"]
    """What starts it: the plug-in of srun (enroot below it), or the program `apptainer`."""
    image: Line
    """In the engine's words: `docker://host#org/image:tag`, or the path of a `.sqsh` or `.sif`."""
    mounts: tuple[Line, ...] = ()
    """`/outside:/inside[:ro]`. The job's workspace is always there, under its own path."""
    options: tuple[Line, ...] = ()
    """More options of `srun` (pyxis) or of `apptainer exec`, as they stand."""


class SlurmSection(Section):
    """Where and how on the cluster; how big stands under `resources`."""

    partition: Line | None = None
    """Partition, or several with commas; the cluster's default unless given."""
    account: Line | None = None
    """Account that pays."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that nodes must have, such as `h100&ib`."""
    reservation: Line | None = None
    """Reservation."""
    gres: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "gpu"
    """What GPUs are called among the generic resources."""
    gpu_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Which of them: `h100` asks for `gpu:h100:2`."""
    exclusive: bool = False
    """Whole nodes."""
    modules: tuple[Line, ...] = ()
    """Modules to load, in this order, after `module purge`."""
    setup: tuple[str, ...] = ()
    """Lines of bash before the program starts; one that fails ends the job with its exit code."""
    container: ContainerSection | None = None
    """The image that the program runs in; none unless given."""
    options: tuple[Option, ...] = ()
    """More options of sbatch, each as `--name=value`."""
    port: Annotated[int, Field(ge=1024, le=60000)] = 20000
    """Several nodes meet on the first one at this port, plus the job's number modulo 5000."""
    timeout_s: Annotated[float, Field(gt=0)] = 60
    """How long a call of sbatch, squeue, sacct or scancel may take, seconds."""
