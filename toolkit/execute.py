"""Run the steps of a plan that are not done, in order, and check each gate as soon as it can be checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from toolkit import tracking
from toolkit.artifact import Artifact
from toolkit.between import Course
from toolkit.gates import Verdict
from toolkit.plan import Step
from toolkit.prepare import Prepared
from toolkit.stage_process import Outcome
from toolkit.survey import StepStatus
from toolkit.tracking import RecipeRun
from toolkit.train.watch.window import Window
from toolkit.worker import Show, StepSpec, probe_step, run_step


@dataclass(frozen=True)
class StepOutcome:
    """A finished step of a run."""

    step: Step
    artifact: Artifact
    cached: bool


@dataclass(frozen=True)
class RunOutcome:
    """A finished run: every step of the plan, and how the gates went."""

    steps: tuple[StepOutcome, ...]
    verdicts: tuple[Verdict, ...]
    parent_run: str | None
    """MLflow run id; None when there was nothing to do."""

    def artifact(self, name: str) -> Artifact:
        """The artifact of a step."""
        return next(s.artifact for s in self.steps if s.step.name == name)


def run_plan(
    prepared: Prepared,
    statuses: list[StepStatus],
    show: Show,
    *,
    resume: bool = True,
    frozen: bool = False,
    profile_steps: Window | None = None,
) -> RunOutcome:
    """Make every artifact of the plan.

    ``profile_steps`` are recorded by the step that trains, if it is not done.

    Raises:
        DriftError: ``frozen``, and something differs from ``toolkit.lock``.
        TrackingError: The MLflow store cannot be opened.
        GateFailedError: A model is worse than the recipe allows; what was made stays.
        ToolkitError: A step's own error.
    """
    course = Course.of(prepared, frozen=frozen)
    course.begin()
    if all(status.done for status in statuses):
        return nothing_to_do(course, statuses)
    recipe = prepared.loaded.recipe
    store = tracking.resolve(recipe.tracking.uri, prepared.workspace)
    tracking.check(store)
    finished: dict[str, Artifact] = {}
    cached = {status.step.name for status in statuses if status.done}
    verdicts: tuple[Verdict, ...] = ()
    show("mlflow", {"event": "started"})
    with RecipeRun.start(
        store,
        recipe.tracking.experiment or recipe.name,
        recipe.model_dump(mode="json"),
        prepared.loaded.path,
        tags={},
    ) as parent:
        for status in statuses:
            name = status.step.name
            if status.artifact:
                finished[name] = status.artifact
            else:
                spec = step_spec(
                    prepared,
                    status.step,
                    store,
                    parent.run_id,
                    resume=resume,
                    profile_steps=profile_steps,
                )
                finished[name] = run_step(spec, show)
            seen = course.step_done(name, finished, parent, cached=name in cached)
            verdicts = seen or verdicts
        course.end(finished)
        outcomes = (StepOutcome(s.step, finished[s.step.name], s.done) for s in statuses)
        return RunOutcome(tuple(outcomes), verdicts, parent.run_id)


def outcome_of(prepared: Prepared, parent_run: str | None, cached: Collection[str]) -> RunOutcome:
    """The outcome of a run whose steps others ran, from their artifacts.

    Args:
        prepared: The plan.
        parent_run: The MLflow run of the recipe.
        cached: Steps that were done before.

    Raises:
        GateFailedError: A model is worse than the recipe allows.
    """
    course = Course.of(prepared)
    made = course.made
    steps = (StepOutcome(s, made[s.name], s.name in cached) for s in prepared.plan.steps)
    return RunOutcome(tuple(steps), course.judge(made), parent_run)


def nothing_to_do(course: Course, statuses: Sequence[StepStatus]) -> RunOutcome:
    """The outcome of a run whose steps are all done: no MLflow run, but lock and gates are held to.

    Raises:
        DriftError: The course is frozen, and the base is another.
        GateFailedError: A model is worse than the recipe allows.
    """
    finished = {s.step.name: s.artifact for s in statuses if s.artifact}
    for name, made in finished.items():
        course.check_base(name, made)
    outcomes = (StepOutcome(s.step, finished[s.step.name], True) for s in statuses)
    return RunOutcome(tuple(outcomes), course.judge(finished), None)


def probe(prepared: Prepared, name: str, show: Show, *, frozen: bool = False) -> Outcome:
    """Try out whether a step fits: make its inputs, then run its stage for what it measures.

    Raises:
        ToolkitError: An input cannot be made, or the step does not fit.
    """
    step = prepared.plan.step(name)
    inputs = prepared.cut(names=tuple(step.inputs.values()))
    run_plan(inputs, inputs.survey(), show, frozen=frozen)
    store = tracking.resolve(prepared.loaded.recipe.tracking.uri, prepared.workspace)
    return probe_step(step_spec(prepared, step, store, None, resume=False), show)


def step_spec(
    prepared: Prepared,
    step: Step,
    store: tracking.Store,
    parent: str | None,
    *,
    resume: bool,
    profile_steps: Window | None = None,
) -> StepSpec:
    """Everything a worker needs to know about one step."""
    plan, workspace, path = prepared.plan, prepared.workspace, prepared.loaded.path
    inputs = {role: plan.step(source) for role, source in step.inputs.items()}
    return StepSpec(
        recipe=plan.recipe.name,
        recipe_path=str(path.absolute()),
        recipe_dir=str(path.parent.absolute()),
        step=step.name,
        stage=step.stage,
        kind=step.kind.value,
        fingerprint=step.fingerprint,
        identity=dict(step.identity),
        config=dict(step.config),
        inputs={
            role: str(workspace.artifact(s.stage, s.fingerprint)) for role, s in inputs.items()
        },
        artifact=str(workspace.artifact(step.stage, step.fingerprint)),
        state=str(workspace.state(step.stage, step.fingerprint)),
        device=prepared.device,
        environments={
            name: dict(_described(prepared, name)) for name in (*step.environments, "core")
        },
        store=store.described(),
        experiment=plan.recipe.tracking.experiment or plan.recipe.name,
        parent_run=parent,
        resume=resume,
        profile_steps=list(profile_steps) if profile_steps and step.stage == "train" else None,
        launch=asdict(prepared.launch) if step.stage == "train" else {},
    )


def _described(prepared: Prepared, name: str) -> Mapping[str, Any]:
    environment = prepared.environments[name]
    if not prepared.elsewhere:
        environment.interpreter()  # raises where it is not there
    return {
        "python": str(environment.python),
        "pythonpath": [str(p) for p in environment.pythonpath],
        "variables": dict(environment.variables),
        "lock": environment.lock,
        "digest": environment.digest,
    }
