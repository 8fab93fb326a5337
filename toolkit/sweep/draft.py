"""A recipe with a ``sweep`` section becomes a sweep: every value is checked before anything runs."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit import digests, tracking
from toolkit.errors import PreflightError, RecipeError, UsageError
from toolkit.gates import LOWER_IS_BETTER
from toolkit.launch import causes, snapshot
from toolkit.launch.folder import write
from toolkit.prepare import Prepared, prepare
from toolkit.recipe.sweep import SweepSection
from toolkit.survey import StepStatus
from toolkit.sweep import space
from toolkit.sweep.folder import SweepFolder, Trial
from toolkit.sweep.space import Assignment
from toolkit.workspace import private_folder

OFF = "sweep=null"
"""A trial is the recipe without its sweep."""
SMALLER = LOWER_IS_BETTER | {"heldout_loss", "final_loss", "peak_gpu_memory_gib"}
"""Metrics that are better when they are smaller."""


@dataclass(frozen=True)
class Draft:
    """A sweep before anything of it is written.

    Attributes:
        base: The recipe as it stands.
        section: What is tried.
        step: The step whose metric is looked at; trials end with it.
        metric: The metric.
        goal: Which is better.
        trials: The plans of all trials; for optuna, of those at the ends.
    """

    base: Prepared
    section: SweepSection
    step: str
    metric: str
    goal: Literal["maximize", "minimize"]
    trials: tuple[tuple[Assignment, Prepared, Sequence[StepStatus]], ...]
    profile: str

    @property
    def id(self) -> str:
        """The recipe's name with a digest of all that the sweep is made of, but for how many run at once."""
        section = self.section.model_dump(mode="json", exclude={"parallel"})
        steps = [(step.name, step.fingerprint) for step in self.base.plan.steps]
        places = [str(self.base.workspace.root), getpass.getuser(), causes.host()]
        profile = self.base.profile.model_dump(mode="json") if self.base.profile else None
        overrides = list(self.base.loaded.overrides)
        tried = [(one, plan.plan.steps[-1].fingerprint) for one, plan, _ in self.trials]
        content = [section, steps, tried, places, profile, [o for o in overrides if not _own(o)]]
        name = re.sub(r"[^a-z0-9]+", "-", self.base.loaded.recipe.name.lower()).strip("-")[:24]
        return f"{name or 'recipe'}-sweep-{digests.of_json(content)[:8]}"

    @property
    def folder(self) -> SweepFolder:
        """Where it is, or will be."""
        return SweepFolder(self.base.workspace.sweeps / self.id)

    def write(self) -> SweepFolder:
        """Put it on disk in one rename; where it is already, only how many may run at once is taken over."""
        folder = self.folder
        if (folder.path / "sweep.json").exists():
            write(folder.path / "sweep.json", folder.asked | {"section": self._section})
            return folder
        part = folder.path.with_name(f".{folder.id}.{os.getpid()}")
        private_folder(part / "trials")
        source, _ = snapshot.keep_recipe(self.base, part)
        for _, prepared, _ in self.trials:  # a trial may name other files
            snapshot.keep_files(prepared.loaded, part)
        for number, values in enumerate(space.planned(self.section), 1):
            SweepFolder(part).keep(Trial(number, values))
        kept = folder.path / source.relative_to(part) / self.base.loaded.path.name
        write(part / "sweep.json", self._record | {"id": folder.id, "snapshot": str(kept)})
        try:
            part.rename(folder.path)
        except OSError:  # the same command, a moment earlier
            shutil.rmtree(part)
        return folder

    @property
    def store(self) -> dict[str, str | None]:
        """The MLflow store, described."""
        uri = self.base.loaded.recipe.tracking.uri
        return tracking.resolve(uri, self.base.workspace).described()

    @property
    def _section(self) -> dict[str, Any]:
        return self.section.model_dump(mode="json")

    @property
    def _record(self) -> dict[str, Any]:
        loaded = self.base.loaded
        return {
            "recipe": str(loaded.path),
            "name": loaded.recipe.name,
            "experiment": loaded.recipe.tracking.experiment or loaded.recipe.name,
            "store": self.store,
            "overrides": list(loaded.overrides),
            "profile": self.profile,
            "section": self._section,
            "step": self.step,
            "metric": self.metric,
            "goal": self.goal,
            "user": getpass.getuser(),
            "host": causes.host(),
            "cwd": str(Path.cwd()),
            "at": time.time(),
        }


def draft(
    recipe: Path, overrides: Sequence[str], profile: str, workspace: Path | None = None
) -> Draft:
    """Read a sweep and check all of its trials.

    Raises:
        RecipeError: The recipe is wrong, or a trial's values make it wrong.
        PreflightError: A trial cannot work.
        UsageError: There is no ``sweep`` section, or it tries nothing.
        NotInstalledError: Optuna is asked for and not there, or an environment.
    """
    base = prepare(recipe, overrides, profile, workspace)
    section = base.loaded.recipe.sweep
    if section is None:
        raise UsageError(
            f"{recipe} has no section `sweep`",
            "say what to try: --set 'sweep.over.train.lora.rank=[8, 16, 32]'",
        )
    space.require(section)
    step, metric = base.loaded.recipe.swept
    where = Path(profile).absolute() if Path(profile).is_file() else profile

    def plan(values: Assignment) -> tuple[Assignment, Prepared, Sequence[StepStatus]]:
        given = (*overrides, *space.overrides(values), OFF)
        try:
            prepared = prepare(recipe, given, profile, workspace).cut(names=(step,))
        except (RecipeError, PreflightError, UsageError) as error:
            text = f"sweep: a trial with {space.shown(values)} cannot run:\n{error.message}"
            raise UsageError(text, error.hint) from error
        return values, prepared, prepared.survey()

    tried = [plan(values) for values in space.ends(section)]
    _insist_on_effect(section, step, tried)
    if listed := space.planned(section):
        tried = [plan(values) for values in listed]
    for _, prepared, statuses in tried:
        prepared.require_environments(statuses)
    goal = section.goal or ("minimize" if metric in SMALLER else "maximize")
    return Draft(base, section, step, metric, goal, tuple(tried), str(where))


def _insist_on_effect(
    section: SweepSection,
    step: str,
    tried: Sequence[tuple[Assignment, Prepared, Sequence[StepStatus]]],
) -> None:
    """Refuse keys whose values all lead to the same step: the sweep would measure one thing again and again.

    Raises:
        UsageError: Names the key.
    """
    first, prepared, _ = tried[0]
    print_of_first = prepared.plan.step(step).fingerprint
    for key in section.over:
        others = [p.plan.step(step).fingerprint for v, p, _ in tried if v[key] != first[key]]
        if others and set(others) == {print_of_first}:
            raise UsageError(
                f"sweep.over: {key} changes nothing that {step} depends on",
                "leave it out, or look at another metric: sweep.metric, sweep.of",
            )


def _own(override: str) -> bool:
    return override.startswith("sweep.")
