"""From a recipe file to something that can be planned, shown or run: the way every command begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from toolkit import environments, preflight
from toolkit.environments import Environment
from toolkit.errors import NotInstalledError, UsageError
from toolkit.launch import profiles
from toolkit.observe import observe
from toolkit.plan import Plan, make_plan
from toolkit.recipe.load import Loaded, load
from toolkit.survey import StepStatus, survey
from toolkit.workspace import Workspace

STAGE_ENVIRONMENTS = ("core", "train", "quantize")


@dataclass(frozen=True)
class Prepared:
    """A checked recipe with its plan, on one machine."""

    loaded: Loaded
    plan: Plan
    workspace: Workspace
    device: Literal["cpu", "cuda"]
    environments: dict[str, Environment]
    """By logical name: core, train, quantize and the recipe's engine."""
    warnings: tuple[str, ...] = ()

    def cut(self, stages: Sequence[str] = (), names: Sequence[str] = ()) -> Prepared:
        """The same, with the plan cut to some stages or steps and what they need."""
        return replace(self, plan=self.plan.upto(stages, names))

    def survey(self) -> list[StepStatus]:
        """What is done and what will run."""
        return survey(self.plan, self.workspace)

    def require_environments(self, statuses: Sequence[StepStatus]) -> None:
        """Refuse to start when a step that will run has no environment.

        Raises:
            NotInstalledError: Names every missing one and the command that builds them.
        """
        needed = {e for status in statuses if not status.done for e in status.step.environments}
        missing = sorted(name for name in needed if not self.environments[name].is_ready)
        for name in missing:
            if self.environments[name].lock is None:
                self.environments[
                    name
                ].interpreter()  # raises: no command builds what a profile names
        if missing:
            raise NotInstalledError(
                f"not built: {'environment' if len(missing) == 1 else 'environments'} {', '.join(missing)}",
                f"toolkit env sync {' '.join(missing)}",
            )

    def require_inputs(self, statuses: Sequence[StepStatus], stages: Sequence[str]) -> None:
        """With ``--only``: refuse when a step before the wanted ones is not done.

        Raises:
            UsageError: Names the steps.
        """
        late = [s for s in statuses if not s.done and s.step.stage not in stages]
        if late:
            raise UsageError(
                f"--only, but {', '.join(s.step.name for s in late)} must be made first ({late[0].why})",
                "leave out --only, and they are",
            )


def prepare(
    recipe: Path,
    overrides: Sequence[str] = (),
    profile: str | None = None,
    workspace: Path | None = None,
) -> Prepared:
    """Load, check and plan a recipe. Takes under a second; needs no GPU and no torch.

    Raises:
        RecipeError: The recipe is wrong, or files that it names are missing.
        PreflightError: It cannot work with the chosen engine, format or machine.
    """
    loaded = load(recipe, overrides)
    where = profiles.load(profile)
    space = Workspace.locate(workspace)
    engine = (loaded.recipe.serve.engine,) if loaded.recipe.serve else ()
    resolved = {
        name: environments.resolve(name, accelerator=where.accelerator, profile=where)
        for name in (*STAGE_ENVIRONMENTS, *engine)
    }
    observed = observe(loaded, {name: e.digest for name, e in resolved.items()})
    plan = make_plan(loaded, observed)
    warnings = preflight.require(loaded, plan, space, resolved, where.device)
    return Prepared(loaded, plan, space, where.device, resolved, tuple(map(str, warnings)))
