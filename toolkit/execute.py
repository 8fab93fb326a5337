"""Run the steps of a plan that are not done, in order, and check each gate as soon as it can be checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from toolkit import gates, tracking
from toolkit.artifact import Artifact
from toolkit.gates import Verdict
from toolkit.lock import Lock
from toolkit.plan import Step
from toolkit.prepare import Prepared
from toolkit.recipe import Recipe
from toolkit.stage_process import Outcome
from toolkit.survey import StepStatus
from toolkit.tracking import RecipeRun
from toolkit.train.watch.window import Window
from toolkit.worker import Show, StepSpec, probe_step, run_step
from toolkit.workspace import private_folder


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
    lock = Lock.beside(prepared.loaded.path)
    lock.compare(prepared, frozen=frozen)
    if all(status.done for status in statuses):
        done = tuple(StepOutcome(s.step, s.artifact, True) for s in statuses if s.artifact)
        for outcome in done:
            if outcome.step.stage == "fetch":
                lock.compare_base(outcome.artifact, prepared, frozen=frozen)
        return RunOutcome(done, _judge(prepared, done), None)
    recipe = prepared.loaded.recipe
    store = tracking.resolve(recipe.tracking.uri, prepared.workspace)
    tracking.check(store)
    finished: list[StepOutcome] = []
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
            if status.artifact:
                finished.append(StepOutcome(status.step, status.artifact, True))
            else:
                spec = _spec(prepared, status.step, store, parent.run_id, resume=resume)
                if profile_steps and status.step.stage == "train":
                    spec = replace(spec, profile_steps=list(profile_steps))
                finished.append(StepOutcome(status.step, run_step(spec, show), False))
            if status.step.stage == "fetch":
                lock.compare_base(finished[-1].artifact, prepared, frozen=frozen)
            _record(parent, finished[-1])
            if status.step.stage == "evaluate":
                verdicts = _judge(prepared, finished, parent)
        lock.write(prepared, {s.step.name: s.artifact for s in finished})
        return RunOutcome(tuple(finished), verdicts, parent.run_id)


def probe(prepared: Prepared, name: str, show: Show, *, frozen: bool = False) -> Outcome:
    """Try out whether a step fits: make its inputs, then run its stage for what it measures.

    Raises:
        ToolkitError: An input cannot be made, or the step does not fit.
    """
    step = prepared.plan.step(name)
    inputs = prepared.cut(names=tuple(step.inputs.values()))
    run_plan(inputs, inputs.survey(), show, frozen=frozen)
    store = tracking.resolve(prepared.loaded.recipe.tracking.uri, prepared.workspace)
    return probe_step(_spec(prepared, step, store, None, resume=False), show)


def _record(parent: RecipeRun, done: StepOutcome) -> None:
    """Show a finished step on the parent's page in MLflow."""
    run_id = (done.artifact.manifest["mlflow"] or {}).get("run_id")
    parent.step_done(done.step.name, done.artifact.metrics, run_id, cached=done.cached)
    if done.step.stage == "choose":
        chosen = done.artifact.manifest["facts"]
        parent.tag({"toolkit.choice": chosen["subject"], "toolkit.choice.why": chosen["why"]})


def _judge(
    prepared: Prepared, finished: Sequence[StepOutcome], parent: RecipeRun | None = None
) -> tuple[Verdict, ...]:
    """Check the gates that can be checked by now, and leave reports for CI before one stops the run.

    Raises:
        GateFailedError: A model is worse than the recipe allows.
    """
    recipe = prepared.loaded.recipe
    verdicts = _verdicts(recipe, finished)
    if verdicts:
        reports = private_folder(prepared.workspace.root / "reports" / recipe.name)
        gates.write(reports, verdicts, recipe.name)
        if parent:
            parent.tag({f"toolkit.gate.{n}": v.message for n, v in enumerate(verdicts)})
    gates.require(verdicts)
    return verdicts


def _verdicts(recipe: Recipe, finished: Sequence[StepOutcome]) -> tuple[Verdict, ...]:
    """Verdicts of the gates whose models are all scored by now."""
    section = recipe.evaluate
    if section is None:
        return ()
    reports = {
        s.artifact.manifest["identity"]["config"]["subject"]: s.artifact.metrics
        for s in finished
        if s.step.stage == "evaluate"
    }
    rows = {subject: int(metrics.get("rows", 0)) for subject, metrics in reports.items()}
    ready = [
        gate
        for gate in section.gates
        if gate.of in reports and (gate.max_drop is None or gate.against in reports)
    ]
    return tuple(gates.check(ready, reports, rows))


def _spec(
    prepared: Prepared, step: Step, store: tracking.Store, parent: str | None, *, resume: bool
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
        launch=asdict(prepared.launch) if step.stage == "train" else {},
    )


def _described(prepared: Prepared, name: str) -> Mapping[str, Any]:
    environment = prepared.environments[name]
    interpreter = environment.interpreter()
    return {
        "python": str(interpreter.python),
        "pythonpath": [str(p) for p in interpreter.pythonpath],
        "variables": dict(interpreter.variables),
        "lock": environment.lock,
        "digest": environment.digest,
    }
