"""Every error a user can meet.

::

    ToolkitError                 exit 1   work was tried and failed
    ├── StepFailedError          1   a step of a plan failed
    ├── DataError                1   rows broke the recipe's rules or a budget
    ├── ModelError               1   a base model cannot be brought here, or is not what the recipe says
    ├── GateFailedError          1   a model is worse than the recipe allows
    ├── TrackingError            1   the MLflow store cannot be opened
    ├── EngineError              1   an inference engine did not start or died
    ├── ProofError               1   what is served is not what was trained
    ├── ArtifactError            1   a stored artifact is damaged or missing
    ├── BackendError             1   an engine for jobs is not there, or refuses a job
    │   ├── UnknownStateError    1   it says of a job what we have no word for
    │   └── NoPlaceError         1   it has no place for a job just now: it waits
    ├── LimitError               1   a limit of the profile allows no more jobs
    │   └── BusyError            1   as many are under way as it allows
    ├── UsageError               2   the command is wrong
    ├── RecipeError              2   the recipe is wrong; holds every problem found, with file and line
    ├── PreflightError           2   the recipe is well formed but cannot work
    ├── DriftError               2   --frozen, and something differs from toolkit.lock
    └── NotInstalledError        3   an environment, a program or a package is missing

A message says what is wrong (with both values) and where; a hint says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class ToolkitError(Exception):
    """An error that is the user's to mend: shown as text, never as a traceback.

    Args:
        message: What is wrong and where, with both values where two disagree.
        hint: What to do about it, best as a command.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class StepFailedError(ToolkitError):
    """A step of a plan failed; ``message`` names the step, its log and the cause."""


class DataError(ToolkitError):
    """Rows broke the recipe's rules or a budget of the ledger."""


class ModelError(ToolkitError):
    """A base model cannot be brought here, or is not what the recipe says."""


class GateFailedError(ToolkitError):
    """A gate of the recipe's ``evaluate`` section did not pass."""


class TrackingError(ToolkitError):
    """The MLflow store cannot be opened."""


class EngineError(ToolkitError):
    """An inference engine did not start, or died."""


class ProofError(ToolkitError):
    """What an engine serves is not what was trained; the message holds the first difference."""


class BackendError(ToolkitError):
    """An engine for jobs does not answer, or refuses a job; in its words."""


class UnknownStateError(BackendError):
    """An engine says of a job what is in no table of ours."""


class NoPlaceError(BackendError):
    """An engine has no place for a job just now; it is asked again."""


class LimitError(ToolkitError):
    """A limit of the profile allows no more jobs now."""


class BusyError(LimitError):
    """As many chains are under way as a profile allows; it will be free when one is over."""


class ArtifactError(ToolkitError):
    """A stored artifact is damaged or missing."""


class UsageError(ToolkitError):
    """The command line is wrong."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where it stands and what to do."""

    where: str  # "recipes/a.yaml:12" or "--set train.lr=1"
    path: str  # "train.lora.rank"; empty for the file as a whole
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.path, self.message) if part)


class RecipeError(ToolkitError):
    """A recipe is wrong; ``problems`` holds all that was found at once."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem], hint: str | None = None) -> None:
        super().__init__("\n".join(str(problem) for problem in problems), hint)
        self.problems = tuple(problems)


class PreflightError(ToolkitError):
    """A well-formed recipe asks for something that the chosen engine or format cannot do."""

    exit_code = 2


class DriftError(ToolkitError):
    """``--frozen`` was asked for and something differs from ``toolkit.lock``."""

    exit_code = 2


class NotInstalledError(ToolkitError):
    """An environment, a program or a package is missing."""

    exit_code = 3


class Interrupted(BaseException):
    """Somebody asked this process to stop (SIGTERM): end in order, with exit code 143."""

    exit_code: ClassVar[int] = 143
