"""From a trained adapter to a version in the registry: by artifact, or by the recipe that made it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolkit import gates, tracking
from toolkit.errors import UsageError
from toolkit.recipe import Recipe
from toolkit.serving.registry import ModelRegistry, Registered
from toolkit.survey import StepStatus
from toolkit.workspace import Workspace


def of_artifact(
    folder: Path, name: str, alias: str | None, space: Workspace, *, uri: str | None = None
) -> Registered:
    """Register an exported adapter's folder.

    Raises:
        ArtifactError: It is none, or it is damaged.
        TrackingError: The store is away or refuses.
    """
    return ModelRegistry(tracking.resolve(uri, space), space).register(
        folder.resolve(), name, alias
    )


def of_recipe(
    recipe: Path,
    name: str,
    alias: str | None,
    space: Workspace,
    *,
    uri: str | None = None,
    overrides: Sequence[str] = (),
    profile: str | None = None,
) -> Registered:
    """Register the adapter that a recipe exported.

    Raises:
        UsageError: The recipe exports no adapter, or has not yet.
        GateFailedError: An alias is to be moved, and a gate of the recipe does not pass.
    """
    from toolkit.prepare import prepare

    prepared = prepare(recipe, overrides, profile, space.root)
    statuses = {status.step.name: status for status in prepared.survey()}
    made = statuses.get("export-adapter")
    if made is None:
        raise UsageError(
            f"{recipe} exports no adapter", "add `export: {formats: [adapter]}` to the recipe"
        )
    if made.artifact is None:
        raise UsageError(
            f"{recipe}: its adapter is not made yet: {made.why}", f"toolkit run {recipe}"
        )
    if alias:
        _require_gates(prepared.loaded.recipe, list(statuses.values()))
    store = tracking.resolve(uri or prepared.loaded.recipe.tracking.uri, prepared.workspace)
    registry = ModelRegistry(store, prepared.workspace)
    return registry.register(made.artifact.path, name, alias)


def _require_gates(recipe: Recipe, statuses: Sequence[StepStatus]) -> None:
    """Gates of the tuned model: an alias that servers follow moves only to what passed."""
    own = [g for g in recipe.evaluate.gates if g.of == "tuned"] if recipe.evaluate else []
    reports = {
        str(s.step.config["subject"]): s.artifact.metrics
        for s in statuses
        if s.step.stage == "evaluate" and s.artifact
    }
    rows = {subject: int(metrics.get("rows", 0)) for subject, metrics in reports.items()}
    gates.require(gates.check(own, reports, rows))
