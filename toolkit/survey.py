"""Compare a plan with the artifacts that are there: what is done, what will run, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit import artifact
from toolkit.artifact import Artifact
from toolkit.plan import Plan, Step
from toolkit.workspace import Workspace


@dataclass(frozen=True)
class StepStatus:
    """Whether a step is done, and why it will run when it is not."""

    step: Step
    artifact: Artifact | None
    why: str

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.artifact is not None


def survey(plan: Plan, workspace: Workspace) -> list[StepStatus]:
    """For every step: is it done, and if not, why will it run."""
    statuses: dict[str, StepStatus] = {}
    for step in plan.steps:
        found = artifact.find(workspace.artifact(step.stage, step.fingerprint))
        problem = artifact.damage(found) if found else None
        if found and not problem:
            statuses[step.name] = StepStatus(step, found, "done")
            continue
        late = [name for name in step.inputs.values() if not statuses[name].done]
        why = (
            f"its artifact is damaged: {problem}" if problem else _why(plan, step, workspace, late)
        )
        statuses[step.name] = StepStatus(step, None, why)
    return list(statuses.values())


def _why(plan: Plan, step: Step, workspace: Workspace, late: Sequence[str]) -> str:
    changes = list(_changes(plan, step, workspace))
    if changes:
        return "; ".join(changes[:3]) + (
            f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
        )
    return f"after {', '.join(late)}" if late else "new"


def _changes(plan: Plan, step: Step, workspace: Workspace) -> Iterator[str]:
    """How this step differs from the newest artifact of the same step of the same recipe."""
    newest: dict[str, Any] | None = None
    for path in (workspace.root / "artifacts" / step.stage).glob(f"*/{artifact.MANIFEST}"):
        found = artifact.find(path.parent)
        same = found and (found.manifest["recipe"], found.manifest["step"]) == (
            plan.recipe.name,
            step.name,
        )
        if found and same and (newest is None or found.manifest["created"] > newest["created"]):
            newest = dict(found.manifest)
    if newest is None:
        return
    before, now = flatten(newest["identity"]), flatten(step.identity)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key):
            continue
        name, _, rest = key.partition(".")
        if name == "config":
            yield f"{rest} {_short(before.get(key))} -> {_short(now.get(key))}"
        elif name == "inputs":
            yield f"{step.inputs.get(rest, rest)} changed"
        else:
            yield f"{rest or name} changed"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; list members by index."""
    if isinstance(value, Mapping) and value:
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
