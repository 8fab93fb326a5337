"""A sweep's own folder: all that is known of it. Each file is written whole, so any process may be killed at any time.

::

    <workspace>/sweeps/<id>/
    ├── sweep.json        what was asked, by whom, when
    ├── recipe.yaml, source/   the snapshot: later edits change nothing
    ├── trials/0001.json  values, state, chain of jobs, what was measured
    ├── stopped.json      why the driver gave up; the same command goes on
    ├── cancelled.json    somebody asked for its end
    ├── result.json       it is over: status, best trial
    ├── lock              held by the driver while it lives
    └── driver.log
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import UsageError
from toolkit.launch.folder import read, write
from toolkit.launch.states import State
from toolkit.recipe.sweep import SweepSection
from toolkit.sweep import space


@dataclass(frozen=True)
class Trial:
    """One trial, as its file says.

    Attributes:
        number: From 1.
        values: Value by key of the recipe.
        state: ``queued`` until it is submitted, ``running`` until its chain is over.
        chain: Its chain of jobs; none where all was done before.
        value: What was measured.
        reason: Why it failed, or waits.
        run: MLflow run of the trial.
        at: When it was submitted; seconds since 1970.
        ended: When it was over.
    """

    number: int
    values: dict[str, Any] = field(default_factory=dict)
    state: State = State.queued
    chain: str | None = None
    value: float | None = None
    reason: str | None = None
    run: str | None = None
    at: float | None = None
    ended: float | None = None


@dataclass(frozen=True)
class SweepFolder:
    """Reads and writes the files of one sweep."""

    path: Path

    @property
    def id(self) -> str:
        """The sweep's id."""
        return self.path.name

    @property
    def asked(self) -> dict[str, Any]:
        """``sweep.json``.

        Raises:
            UsageError: There is no such sweep.
        """
        found = read(self.path / "sweep.json")
        if found is None:
            raise UsageError(f"{self.path} is no sweep", "toolkit sweeps list")
        return found

    @property
    def section(self) -> SweepSection:
        """What is tried."""
        return SweepSection.model_validate(self.asked["section"])

    @property
    def jobs(self) -> Path:
        """The workspace's chains of jobs."""
        return self.path.parent.parent / "jobs"

    @property
    def trials(self) -> list[Trial]:
        """All that are known so far, in order."""
        found = (read(path) for path in sorted((self.path / "trials").glob("[0-9]*.json")))
        return [Trial(**one | {"state": State(one["state"])}) for one in found if one]

    def keep(self, trial: Trial) -> Trial:
        """Write a trial down."""
        write(self.path / "trials" / f"{trial.number:04d}.json", asdict(trial))
        return trial

    @property
    def lock(self) -> Path:
        """Held by the driver while it lives."""
        return self.path / "lock"

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for its end."""
        return (self.path / "cancelled.json").exists()

    @property
    def stopped(self) -> dict[str, Any] | None:
        """Why the driver gave up, if it did: ``message``, ``hint``, ``exit_code``."""
        return read(self.path / "stopped.json")

    @property
    def result(self) -> dict[str, Any] | None:
        """``status``, ``best`` (number of a trial) and when; ``None`` while it is not over."""
        return read(self.path / "result.json")

    def best(self, trials: Sequence[Trial]) -> Trial | None:
        """The best of those that succeeded; the first one where several are."""
        good = [one for one in trials if one.state is State.succeeded and one.value is not None]
        sign = 1 if self.asked["goal"] == "minimize" else -1
        return min(good, key=lambda one: (sign * (one.value or 0.0), one.number), default=None)

    def command(self, trial: Trial) -> str:
        """What runs the whole recipe as a trial had it; what the trial made is not made again."""
        asked = self.asked
        given = [one for one in asked["overrides"] if not one.startswith("sweep")]
        sets = (("--set", one) for one in (*given, *space.overrides(trial.values)))
        on = () if asked["profile"] == "local" else ("--on", asked["profile"])
        return shlex.join(
            ["toolkit", "run", asked["recipe"], *on, *(w for pair in sets for w in pair)]
        )


def sweeps(root: Path) -> list[SweepFolder]:
    """All sweeps of a workspace, the oldest first."""
    found = [SweepFolder(path.parent) for path in root.glob("[!.]*/sweep.json")]
    return sorted(found, key=lambda one: (one.asked["at"], one.id))


def find(root: Path, name: str | None) -> SweepFolder:
    """The sweep of an id, or the only one that begins so; the newest where none is named.

    Raises:
        UsageError: None or several are named so.
    """
    known = sweeps(root)
    found = [one for one in known if one.id.startswith(name or "")]
    exact = [one for one in found if one.id == name]
    if exact or len(found) == 1 or (found and name is None):
        return (exact or found)[-1]
    if found:
        raise UsageError(
            f"{name} may be {', '.join(one.id for one in found[:5])}", "say more of it"
        )
    what = "no sweep is here" if name is None else f"no sweep is named {name!r}"
    raise UsageError(what, "toolkit sweeps list")
