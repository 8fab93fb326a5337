"""A plan as a chain of jobs: one job for each step that is not done, each after the one before it.

A chain's id is a digest of all that it is made of (steps, profile, code) and of how often that was submitted before. So
a dry run shows the very text that the next submission sends, and a submission that was cut off is found again: the same
command goes on with it and starts nothing twice.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from toolkit import digests
from toolkit.between import Course
from toolkit.execute import step_spec
from toolkit.launch import causes, snapshot
from toolkit.launch.backend import Backend, backend_of
from toolkit.launch.profiles import AskedSection, Profile, seconds_of
from toolkit.launch.report import is_over
from toolkit.launch.spec import JobSpec, Resources
from toolkit.prepare import Prepared
from toolkit.survey import StepStatus
from toolkit.tracking import Store, resolve
from toolkit.tracking.store import without_password
from toolkit.train.watch.window import Window
from toolkit.worker import StepSpec

LONGEST_ID = 52
WITHOUT_GPU = ("data", "choose")
"""Stages that compute nothing on a GPU."""
CARRIED = (
    *("TOOLKIT_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "NO_PROXY", "HTTPS_PROXY"),
    *("UV_DEFAULT_INDEX", "UV_INDEX", "UV_FIND_LINKS", "PIP_INDEX_URL", "PIP_FIND_LINKS"),
)
"""Variables of the submitter that jobs get, unless they hold a password."""


@dataclass(frozen=True)
class How:
    """How a plan is run.

    Attributes:
        resume: Whether a step goes on from checkpoints that are there; later attempts of a job always do.
        frozen: Whether a run that differs from ``toolkit.lock`` is refused.
        profile_steps: Optimizer steps that PyTorch's profiler records.
    """

    resume: bool = True
    frozen: bool = False
    profile_steps: Window | None = None


@dataclass(frozen=True)
class TrialOf:
    """The sweep that a chain is a trial of.

    Attributes:
        sweep: The sweep's id.
        number: The trial's, from 1.
        parent_run: MLflow run of the sweep.
    """

    sweep: str
    number: int
    parent_run: str | None

    @property
    def tags(self) -> dict[str, str]:
        """What its MLflow run says of that."""
        below = {"mlflow.parentRunId": self.parent_run} if self.parent_run else {}
        return {"toolkit.sweep": self.sweep, "toolkit.trial": str(self.number)} | below

    def course(self, course: Course) -> Course:
        """A trial's: reports beside those of other trials, and nothing in ``toolkit.lock``."""
        reports = Path(course.reports) / self.sweep / str(self.number)
        return replace(course, reports=str(reports), locks=False)


@dataclass(frozen=True)
class Draft:
    """A chain before anything of it is written."""

    id: str
    prepared: Prepared
    profile: Profile
    folder: Path
    jobs: tuple[JobSpec, ...]
    steps: tuple[StepSpec, ...]
    record: Mapping[str, Any]
    """``chain.json``."""

    @property
    def backend(self) -> Backend:
        """The engine."""
        return backend_of(self.profile.backend, self.profile.options, self.folder.parent)

    def rendered(self) -> Iterator[tuple[JobSpec, str]]:
        """What would be submitted; engine ids that are not known yet stand as ``<id of JOB>``."""
        backend = self.backend
        for job in self.jobs:
            yield job, backend.render(job, {name: f"<id of {name}>" for name in job.after})


def draft(
    prepared: Prepared, statuses: Sequence[StepStatus], how: How, trial: TrialOf | None = None
) -> Draft:
    """The chain that a plan would be; nothing is written.

    Args:
        prepared: The plan, with its profile.
        statuses: What of it is done.
        how: How to run it.
        trial: Where it belongs, if it is part of a sweep.
    """
    profile = prepared.profile or Profile(name="local")
    code, todo = snapshot.code_digest(), [s.step for s in statuses if not s.done]
    more = {"trial": [trial.sweep, trial.number]} if trial else {}
    content = _content(prepared, profile, {"code": code, **vars(how), **more}, statuses)
    chain = _next_id(prepared.plan.recipe.name, content, prepared.workspace.jobs)
    folder = prepared.workspace.jobs / chain
    store = resolve(prepared.loaded.recipe.tracking.uri, prepared.workspace)
    ids = [_job_id(chain, number, step.name) for number, step in enumerate(todo, 1)]
    environ = _environ(prepared, profile, prepared.workspace.jobs / "code" / code[:16])
    jobs = tuple(
        JobSpec(
            id=ids[number],
            chain=chain,
            step=step.name,
            stage=step.stage,
            folder=str(folder / ids[number]),
            after=tuple(ids[max(0, number - 1) : number]),
            argv=_argv(profile, folder / ids[number]),
            env=environ,
            secrets=dict(profile.secrets),
            resources=resources_of(prepared, profile, step.stage),
            retries=profile.retries,
            grace_s=profile.grace_s,
            options=profile.options,
        )
        for number, step in enumerate(todo)
    )
    specs = (
        step_spec(prepared, step, store, None, resume=how.resume, profile_steps=how.profile_steps)
        for step in todo
    )
    steps = tuple(replace(spec, key=name) for spec, name in zip(specs, ids, strict=True))
    course = Course.of(prepared, frozen=how.frozen)
    record = _record(prepared, profile, store) | {
        "id": chain,
        "content": content,
        "jobs": {job.id: job.step for job in jobs},
        "code": code,
        "course": (trial.course(course) if trial else course).described(),
        "trial": asdict(trial) if trial else None,
    }
    return Draft(chain, prepared, profile, folder, jobs, steps, record)


def _content(
    prepared: Prepared, profile: Profile, how: Mapping[str, Any], statuses: Sequence[StepStatus]
) -> str:
    """Digest of all that makes a chain this one; what of it is done already is no part of it."""
    return digests.of_json(
        {
            "steps": [(s.step.name, s.step.fingerprint) for s in statuses],
            "profile": profile.model_dump(mode="json"),
            "where": [str(prepared.workspace.root), getpass.getuser(), causes.host()],
            **how,
        }
    )


def _record(prepared: Prepared, profile: Profile, store: Store) -> dict[str, Any]:
    recipe = prepared.loaded.recipe
    return {
        "recipe": recipe.name,
        "profile": profile.name,
        "backend": profile.backend,
        "options": profile.options,
        "user": getpass.getuser(),
        "host": causes.host(),
        "overrides": list(prepared.loaded.overrides),
        "store": store.described(),
        "experiment": recipe.tracking.experiment or recipe.name,
    }


def _next_id(recipe: str, content: str, jobs: Path) -> str:
    """The id of the chain of this content that has not ended, or the first that is free."""
    name, tries = _slug(recipe)[:24].strip("-") or "recipe", 0
    while True:
        found = f"{name}-{digests.of_json([content, tries])[:8]}"
        if not (jobs / found / "chain.json").exists() or not is_over(jobs / found):
            return found
        tries += 1


def _job_id(chain: str, number: int, step: str) -> str:
    """``tickets-3fa2c1d4-04-train``; a long step's name ends in its digest."""
    room = LONGEST_ID - len(chain) - 4
    name = _slug(step)
    if len(name) > room:
        name = f"{name[: room - 7]}-{digests.of_json(step)[:6]}"
    return f"{chain}-{number:02d}-{name}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _argv(profile: Profile, folder: Path) -> tuple[str, ...]:
    """The shim; ``-P``, so that a folder named toolkit where the engine starts it is not taken for ours."""
    return (profile.interpreter, "-P", "-m", "toolkit.launch.shim", str(folder))


def _environ(prepared: Prepared, profile: Profile, code: Path) -> dict[str, str]:
    """Variables of the jobs: the kept code first on the path, then the core's own folders."""
    folders = [str(code), *(str(path) for path in prepared.environments["core"].pythonpath)]
    carried = {name: os.environ[name] for name in CARRIED if name in os.environ}
    kept = {name: text for name, text in carried.items() if without_password(text) == text}
    return kept | {"PYTHONPATH": os.pathsep.join(folders)} | dict(profile.variables)


def resources_of(prepared: Prepared, profile: Profile, stage: str) -> Resources:
    """What a stage's job takes: what the profile says of the stage, then of all, then the default."""
    asked, launch = profile.resources, prepared.launch
    of_stage = asked.stages.get(stage, AskedSection())  # type: ignore[call-overload]
    train = stage == "train"
    computes = prepared.device == "cuda" and stage not in WITHOUT_GPU
    gpus = (launch.processes if train else 1) if computes else 0
    limit = of_stage.time_limit or asked.time_limit
    return Resources(
        gpus=_first(of_stage.gpus, None if train or not computes else asked.gpus, gpus),
        cpus=_first(of_stage.cpus, asked.cpus, 1),
        memory_gib=_first(of_stage.memory_gib, asked.memory_gib, None),
        nodes=launch.nodes if train else 1,
        time_limit_s=seconds_of(limit) if limit else None,
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
