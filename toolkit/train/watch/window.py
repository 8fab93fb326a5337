"""``--profile-steps 10:13``: which optimizer steps are recorded. Pure; the command line reads it too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from toolkit.errors import UsageError

if TYPE_CHECKING:
    from toolkit.recipe import Recipe
    from toolkit.survey import StepStatus

LONGEST = 50
"""Steps; a trace of more is too large for the viewers, and shows nothing that fewer do not."""

FOLDER = "profile"
"""Folder of the trace, in the step's state while it trains and in its artifact afterwards."""


class Window(NamedTuple):
    """Optimizer steps from ``first`` to ``last``, both recorded, counted from 1 as metrics are."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}:{self.last}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """``"10:13"`` -> steps 10, 11, 12 and 13.

        Raises:
            UsageError: It is no window.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if not match:
            raise UsageError(
                f"--profile-steps is {text!r}, not FIRST:LAST",
                "write --profile-steps 10:13 for steps 10, 11, 12 and 13",
            )
        found = cls(int(match[1]), int(match[2]))
        if found.first < 1:
            raise UsageError(
                f"--profile-steps is {text}, but steps are counted from 1",
                f"write --profile-steps 1:{max(1, found.last)}",
            )
        if found.first > found.last:
            raise UsageError(
                f"--profile-steps is {text}: its first step comes after its last",
                f"write --profile-steps {found.last}:{found.first}",
            )
        if len(range(*found)) >= LONGEST:
            raise UsageError(
                f"--profile-steps is {text}, which is {found.last - found.first + 1} steps: a trace "
                f"holds {LONGEST} at most",
                f"write --profile-steps {found.first}:{found.first + 3}",
            )
        return found

    def insist_before(self, total: int, what: str) -> None:
        """Refuse a window that training ends before.

        Args:
            total: Optimizer steps of the run.
            what: Where that number comes from.

        Raises:
            UsageError: Its last step is beyond ``total``.
        """
        if self.last > total:
            first = max(1, min(self.first, total - (self.last - self.first)))
            raise UsageError(
                f"--profile-steps is {self}, but {what} {total}",
                f"write --profile-steps {first}:{total}, or train longer",
            )

    @property
    def file(self) -> str:
        """Name of its files, without their ending."""
        return f"steps-{self.first}-{self.last}"


def insist(window: Window, recipe: Recipe, statuses: Sequence[StepStatus]) -> None:
    """Refuse a profile that cannot be made, before anything starts.

    A step that is done and has this very profile is fine: the same command may be given again.

    Raises:
        UsageError: Nothing is trained, or what is trained is done, or it ends before the window.
    """
    found = next((s for s in statuses if s.step.stage == "train"), None)
    if recipe.train is None or found is None:
        raise UsageError(
            f"--profile-steps is {window}, but no step of this command trains",
            "leave it out, or give a recipe with a train section",
        )
    if recipe.train.max_steps is not None:
        window.insist_before(recipe.train.max_steps, "train.max_steps is")
    if found.artifact is None or trace_of(window, found.artifact.path).exists():
        return
    raise UsageError(
        f"--profile-steps is {window}, but step {found.step.name} is done: nothing is trained, so "
        "there is nothing to record",
        f"profile a short run beside it: --set train.max_steps={window.last + 1}; the model and the "
        "rows are not made again",
    )


def trace_of(window: Window, folder: Path) -> Path:
    """The trace of a window below the step's folder."""
    return folder / FOLDER / f"{window.file}.json.gz"
