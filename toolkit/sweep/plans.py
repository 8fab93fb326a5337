"""The plans of trials: what each has to make, whether another one is making it, what was measured at its end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit import artifact
from toolkit.launch.folder import read
from toolkit.plan import Step
from toolkit.prepare import Prepared, prepare
from toolkit.survey import StepStatus
from toolkit.sweep import space
from toolkit.sweep.draft import OFF
from toolkit.sweep.folder import SweepFolder, Trial


@dataclass(frozen=True)
class TrialPlan:
    """A trial with its plan, as far as the step whose metric counts."""

    trial: Trial
    prepared: Prepared
    statuses: Sequence[StepStatus]

    @property
    def todo(self) -> dict[str, str]:
        """Names of the steps that are not done, by the artifact that they make."""
        left = (one.step for one in self.statuses if not one.done)
        return {self.place(step): step.name for step in left}

    def place(self, step: Step) -> str:
        """Where a step's artifact is, or will be."""
        return str(self.prepared.workspace.artifact(step.stage, step.fingerprint))


class Plans:
    """Makes the plan of each trial once, from the sweep's own copy of the recipe."""

    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder
        self._asked = folder.asked
        self._made: dict[int, Prepared] = {}

    def of(self, trial: Trial) -> TrialPlan:
        """A trial's plan, with what of it is done by now.

        Raises:
            ToolkitError: Its values do not make a recipe that works.
        """
        asked = self._asked
        if trial.number not in self._made:
            given = (*asked["overrides"], *space.overrides(trial.values), OFF)
            root = self._folder.path.parent.parent
            prepared = prepare(Path(asked["snapshot"]), given, asked["profile"], root)
            self._made[trial.number] = prepared.cut(names=(asked["step"],))
        prepared = self._made[trial.number]
        return TrialPlan(trial, prepared, prepared.survey())

    def forget(self, trial: Trial) -> None:
        """Drop a plan that is not needed any more."""
        self._made.pop(trial.number, None)

    def in_the_making(self, running: Iterable[Trial]) -> set[str]:
        """Artifacts of trials that run. Two chains that make one would wait for each other on two places."""
        chains = (read(self._folder.jobs / str(one.chain) / "chain.json") for one in running)
        return {step["artifact"] for chain in chains if chain for step in chain["course"]["steps"]}

    def measured(self, place: str) -> tuple[float | None, str | None]:
        """The metric in an artifact, or why there is none."""
        made = artifact.find(Path(place))
        numbers = made.metrics if made else {}
        value = numbers.get(self._asked["metric"])
        if value is None or not math.isfinite(value):
            known = ", ".join(sorted(numbers)) or "nothing"
            step, metric = self._asked["step"], self._asked["metric"]
            return None, f"{step} measured no {metric} (measured: {known})"
        return value, None
