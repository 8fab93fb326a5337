"""Submitting: everything is on disk before any engine is asked, in an order that survives a kill at any point."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from toolkit import tracking
from toolkit.launch import keeping, limits, secrets, snapshot
from toolkit.launch.chain import Draft, How, TrialOf, draft
from toolkit.launch.folder import write
from toolkit.launch.handing import hand_over, hand_over_array
from toolkit.prepare import Prepared
from toolkit.survey import StepStatus
from toolkit.tracking import Store
from toolkit.tracking.describe import GitState
from toolkit.workspace import private_folder


@dataclass(frozen=True)
class Submitted:
    """A chain that an engine, or the keeper, has."""

    folder: Path
    before: bool
    """Whether it was submitted before and has not ended: nothing new was started."""

    @property
    def id(self) -> str:
        """The chain's id."""
        return self.folder.name


def submit(
    prepared: Prepared, statuses: Sequence[StepStatus], how: How, trial: TrialOf | None = None
) -> Submitted:
    """Submit what is not done of a plan, or go on with the submission of the same that was cut off.

    Raises:
        DriftError: ``frozen``, and something differs from ``toolkit.lock``.
        LimitError: The profile allows no more; BusyError where it will when others are over.
        UsageError: A secret would not reach the jobs.
        TrackingError: The MLflow store cannot be opened.
        BackendError: The engine is not there, or refuses.
    """
    with _alone(private_folder(prepared.workspace.jobs) / "submit.lock"):
        made = _written(prepared, statuses, how, trial)
        hand_over(made.folder)
    return made


def submit_together(
    plans: Sequence[tuple[Prepared, Sequence[StepStatus], TrialOf]], how: How, parallel: int
) -> list[Submitted]:
    """Submit trials of a sweep, as arrays where the engine takes some; what was cut off is gone on with.

    Args:
        plans: Of one workspace and profile.
        how: How to run them.
        parallel: How many tasks of an array may run at once.

    Raises:
        LimitError: The profile allows no more; BusyError where it will when others are over.
        UsageError: A secret would not reach the jobs.
        TrackingError: The MLflow store cannot be opened.
        BackendError: The engine is not there, or refuses.
    """
    with _alone(private_folder(plans[0][0].workspace.jobs) / "submit.lock"):
        made = [_written(prepared, done, how, trial) for prepared, done, trial in plans]
        hand_over_array([one.folder for one in made], parallel)
    return made


def go_on(folders: Sequence[Path], parallel: int) -> None:
    """Hand over chains that were written, where that was cut off.

    Raises:
        BackendError: The engine is not there, or refuses.
    """
    if folders:
        with _alone(folders[0].parent / "submit.lock"):
            hand_over_array(folders, parallel)


def _written(
    prepared: Prepared, statuses: Sequence[StepStatus], how: How, trial: TrialOf | None
) -> Submitted:
    """The chain on disk: a new one, or that of the same content which is not over."""
    made = draft(prepared, statuses, how, trial)
    before = (made.folder / "chain.json").exists()
    if not before:
        if not made.backend.ordered:
            keeping.require()
        if made.profile.backend == "local":
            secrets.check(made.profile.secrets, made.folder.parent)
        limits.check(made)
        tracking.check(Store.read(made.record["store"]))
        _write(made)
    return Submitted(made.folder, before)


def _write(made: Draft) -> None:
    """Everything that the chain is, in one rename."""
    part = made.folder.with_name(f".{made.folder.name}.part")
    if part.exists():
        shutil.rmtree(part)
    private_folder(part)
    snapshot.keep_code(made.folder.parent, made.record["code"])
    source, state = snapshot.keep_recipe(made.prepared, part)
    recipe_dir = made.folder / source.relative_to(part)
    for spec, step in zip(made.jobs, made.steps, strict=True):
        job = private_folder(part / spec.id)
        (job / "job.json").write_text(spec.to_json())
        kept = replace(step, recipe_dir=str(recipe_dir), code=_git(state))
        write(job / "step.json", {"spec": asdict(kept)})
    write(part / "chain.json", dict(made.record) | {"at": time.time()})
    part.rename(made.folder)


def _git(state: GitState | None) -> dict[str, str] | None:
    return asdict(state) if state else None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One submission at a time in a workspace."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
