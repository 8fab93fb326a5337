"""What happens between the steps of a run: recorded on its page in MLflow, gates, ``toolkit.lock``.

The same for steps in this process (``execute.py``) and for jobs, each of which does its own step's part
(``launch/within.py``). So everything it needs is one value that can be written down: :class:`Course`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from toolkit import artifact, gates
from toolkit.artifact import Artifact
from toolkit.gates import Verdict
from toolkit.lock import Lock, planned
from toolkit.recipe import Recipe
from toolkit.tracking import RecipeRun
from toolkit.workspace import private_folder

if TYPE_CHECKING:
    from toolkit.prepare import Prepared


@dataclass(frozen=True)
class Place:
    """A step of a run and the folder of what it makes."""

    name: str
    stage: str
    artifact: str


@dataclass(frozen=True)
class Course:
    """All of a run that is needed between its steps. Plain data: jobs read it from ``chain.json``.

    Attributes:
        recipe: The resolved recipe, as JSON values.
        recipe_path: The recipe's file, beside which ``toolkit.lock`` lies.
        reports: Folder of the gates' reports for CI.
        steps: In order.
        locked: What planning saw of that which the lock holds.
        frozen: Whether a run that differs from the lock is refused.
        locks: Whether the run is written into the lock at its end; trials of a sweep are not.
    """

    recipe: Mapping[str, Any]
    recipe_path: str
    reports: str
    steps: tuple[Place, ...]
    locked: Mapping[str, Any]
    frozen: bool = False
    locks: bool = True

    @classmethod
    def of(cls, prepared: Prepared, *, frozen: bool = False) -> Self:
        """The course of a plan."""
        recipe, place = prepared.loaded.recipe, prepared.workspace.artifact
        steps = (
            Place(s.name, s.stage, str(place(s.stage, s.fingerprint))) for s in prepared.plan.steps
        )
        return cls(
            recipe.model_dump(mode="json"),
            str(prepared.loaded.path.absolute()),
            str(prepared.workspace.root / "reports" / recipe.name),
            tuple(steps),
            planned(prepared),
            frozen,
        )

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Self:
        """What :meth:`described` described."""
        steps = tuple(Place(**step) for step in described["steps"])
        return cls(**{**described, "steps": steps})

    def described(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @property
    def made(self) -> dict[str, Artifact]:
        """Artifacts that are there, by step."""
        found = ((step.name, artifact.find(Path(step.artifact))) for step in self.steps)
        return {name: one for name, one in found if one is not None}

    def begin(self) -> None:
        """Before any step.

        Raises:
            DriftError: ``frozen``, and something differs from ``toolkit.lock``.
        """
        self._lock.compare(self.locked, frozen=self.frozen)

    def check_base(self, step: str, made: Artifact) -> None:
        """With ``frozen``: refuse a fetched base that is not the locked one.

        Raises:
            DriftError: With every difference.
        """
        if self._stage(step) == "fetch":
            self._lock.compare_base(made, self.locked, frozen=self.frozen)

    def step_done(
        self, step: str, finished: Mapping[str, Artifact], parent: RecipeRun, *, cached: bool
    ) -> tuple[Verdict, ...]:
        """After a step: hold its base to the lock, show it on the run's page, check the gates that can be.

        Args:
            step: Its name.
            finished: Artifacts by step: its own, and those before it.
            parent: The MLflow run of the recipe.
            cached: Whether it was made before.

        Raises:
            DriftError: ``frozen``, and the base is another.
            GateFailedError: A model is worse than the recipe allows.
        """
        made = finished[step]
        self.check_base(step, made)
        run_id = (made.manifest["mlflow"] or {}).get("run_id")
        parent.step_done(step, made.metrics, run_id, cached=cached)
        if self._stage(step) == "choose":
            chosen = made.manifest["facts"]
            parent.tag({"toolkit.choice": chosen["subject"], "toolkit.choice.why": chosen["why"]})
        return self.judge(finished, parent) if self._stage(step) == "evaluate" else ()

    def judge(
        self, finished: Mapping[str, Artifact], parent: RecipeRun | None = None
    ) -> tuple[Verdict, ...]:
        """Check the gates that can be checked by now, and leave reports for CI before one stops the run.

        Raises:
            GateFailedError: A model is worse than the recipe allows.
        """
        recipe = Recipe.model_validate(self.recipe)
        evaluations = [a for name, a in finished.items() if self._stage(name) == "evaluate"]
        verdicts = _verdicts(recipe, evaluations)
        if verdicts:
            gates.write(private_folder(Path(self.reports)), verdicts, recipe.name)
            if parent:
                parent.tag({f"toolkit.gate.{n}": v.message for n, v in enumerate(verdicts)})
        gates.require(verdicts)
        return verdicts

    def end(self, finished: Mapping[str, Artifact]) -> None:
        """After the last step: lock what was used."""
        if self.locks:
            self._lock.write(self.locked, finished)

    @property
    def _lock(self) -> Lock:
        return Lock.beside(Path(self.recipe_path))

    def _stage(self, name: str) -> str:
        return next(step.stage for step in self.steps if step.name == name)


def _verdicts(recipe: Recipe, evaluations: Sequence[Artifact]) -> tuple[Verdict, ...]:
    """Verdicts of the gates whose models are all scored by now."""
    section = recipe.evaluate
    if section is None:
        return ()
    reports = {a.manifest["identity"]["config"]["subject"]: a.metrics for a in evaluations}
    rows = {subject: int(metrics.get("rows", 0)) for subject, metrics in reports.items()}
    ready = [
        gate
        for gate in section.gates
        if gate.of in reports and (gate.max_drop is None or gate.against in reports)
    ]
    return tuple(gates.check(ready, reports, rows))
