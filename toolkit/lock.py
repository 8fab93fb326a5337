"""``toolkit.lock`` beside the recipe: what a run really used, so that the next one can be held to it.

One file for all recipes of a folder: data digests, base revision and file digests, template hash,
environment locks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.artifact import Artifact
from toolkit.errors import DriftError, Problem, RecipeError

if TYPE_CHECKING:
    from toolkit.prepare import Prepared

NAME = "toolkit.lock"


@dataclass(frozen=True)
class Lock:
    """The lock of one recipe."""

    path: Path
    recipe: str
    """File name of the recipe."""
    content: Mapping[str, Any]
    """What the lock file says of every recipe beside it."""

    @classmethod
    def beside(cls, recipe: Path) -> Lock:
        """Read the lock file in the recipe's folder; an absent one is empty."""
        path = recipe.parent / NAME
        try:
            content = json.loads(path.read_text())["recipes"]
        except FileNotFoundError:
            content = {}
        except (ValueError, KeyError) as error:
            problem = Problem(str(path), "", f"is not a lock file: {error}")
            raise RecipeError(
                [problem], f"remove it; the next run writes it anew: rm {path}"
            ) from error
        return cls(path, recipe.name, content)

    @property
    def entry(self) -> Mapping[str, Any] | None:
        """What is locked for this recipe; None when nothing is."""
        return self.content.get(self.recipe)

    def compare(self, planned: Mapping[str, Any], *, frozen: bool) -> None:
        """With ``frozen``: refuse when what planning saw differs from the lock.

        Raises:
            DriftError: Lists every difference with both values.
        """
        if not frozen:
            return
        if self.entry is None:
            raise DriftError(
                f"--frozen, but {self.path} locks nothing for {self.recipe}",
                f"run once without --frozen and commit {NAME}",
            )
        self._refuse(planned)

    def compare_base(self, base: Artifact, planned: Mapping[str, Any], *, frozen: bool) -> None:
        """With ``frozen``: refuse when the fetched base model is not the locked one."""
        if frozen:
            self._refuse(dict(planned) | {"base": _base(base)})

    def write(self, planned: Mapping[str, Any], artifacts: Mapping[str, Artifact]) -> None:
        """Lock what this run used. Environments of other accelerators stay as they were."""
        entry: dict[str, Any] = dict(planned)
        if "fetch" in artifacts:
            entry["base"] = _base(artifacts["fetch"])
        before = self.entry or {}
        entry["environments"] = dict(before.get("environments", {})) | entry["environments"]
        recipes = dict(self.content) | {self.recipe: dict(before) | entry}
        text = json.dumps({"version": 1, "recipes": recipes}, indent=1, sort_keys=True) + "\n"
        if not self.path.exists() or self.path.read_text() != text:
            temporary = self.path.with_name(f".{NAME}.part")
            temporary.write_text(text)
            temporary.replace(self.path)

    def _refuse(self, now: Mapping[str, Any]) -> None:
        differences = list(_differences(self.entry or {}, now))
        if differences:
            raise DriftError(
                f"--frozen, but {self.recipe} is not what {self.path} locks:\n  "
                + "\n  ".join(differences),
                "run without --frozen to accept the change, and commit the new lock",
            )


def planned(prepared: Prepared) -> dict[str, Any]:
    """What can be locked before anything runs; all methods of :class:`Lock` take it."""
    model = prepared.plan.step("fetch").config
    config = {step.name: step.config for step in prepared.plan.steps}
    return {
        "model": {key: model[key] for key in ("source", "revision", "sha256")},
        "files": {k: v for c in config.values() for k, v in c.get("digests", {}).items()},
        "environments": {e.lock: e.digest for e in prepared.environments.values() if e.lock},
    }


MEASURED = ("metrics.jsonl", "reference.json")
"""Files beside a base that hold what this machine computed of it, to the last bit no two alike."""


def _base(base: Artifact) -> dict[str, Any]:
    files = {
        name: known["sha256"]
        for name, known in base.manifest["files"].items()
        if name not in MEASURED
    }
    return {"files": files, "template_sha256": base.manifest["facts"].get("template_sha256")}


def _differences(locked: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines such as ``environments.train-cpu: 1234… -> abcd…``; an environment that was never used is no difference."""
    found = []
    for key in sorted(now):
        path = f"{prefix}{key}"
        if isinstance(now[key], Mapping):
            inner = locked.get(key)
            found += _differences(inner if isinstance(inner, Mapping) else {}, now[key], f"{path}.")
            if key == "files" and isinstance(inner, Mapping):
                found += [
                    f"{path}.{name}: locked, but no longer there"
                    for name in sorted(inner.keys() - now[key].keys())
                ]
        elif prefix == "environments." and key not in locked:
            continue
        elif locked.get(key) != now[key]:
            found.append(f"{path}: {_short(locked.get(key))} -> {_short(now[key])}")
    return found


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
