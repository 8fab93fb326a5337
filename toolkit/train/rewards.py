"""Reward functions: the user's judgement of an answer, called with what it asks for and checked."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.data.render import prompt_messages, reference
from toolkit.errors import StepFailedError
from toolkit.user_code import UserFunction, line_in, load_function

SIGNATURE = "def function(prompts, completions, **columns) -> list[float]"
ALWAYS = ("prompts", "completions", "references")
TRIED = 4
"""Rows with which a function is called before anything is loaded."""


@dataclass(frozen=True)
class Question:
    """A row of which the model writes the answer."""

    messages: list[Mapping[str, Any]]
    """What is asked, system prompt and earlier turns included."""
    reference: str | None
    """The row's own answer, if it brings one."""
    columns: Mapping[str, Any]
    """The other columns of the row."""


def read_questions(file: Path) -> list[Question]:
    """All rows of a ``.jsonl`` of a dataset artifact, in the order of the file."""
    with file.open(encoding="utf-8") as lines:
        return [_question(json.loads(line)) for line in lines]


def _question(row: Mapping[str, Any]) -> Question:
    answered = row["messages"][-1]["role"] == "assistant"
    return Question(
        list(prompt_messages(row)), reference(row) if answered else None, row.get("columns", {})
    )


@dataclass(frozen=True)
class Reward:
    """A user's function, given the arguments that it takes.

    It is called once for many answers, as in TRL: ``prompts`` are lists of messages, ``completions``
    texts, ``references`` the answers that rows bring (None where one brings none), and every other
    column of the rows is a list under its own name.
    """

    name: str
    function: UserFunction

    def __call__(self, questions: Sequence[Question], completions: Sequence[str]) -> list[float]:
        """One number for every answer.

        Raises:
            StepFailedError: The function raises, or what it returns is not one number per answer.
        """
        try:
            found = self.function.call(**self._arguments(questions, completions))
            scores = list(found)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            said = f"{type(error).__name__}: {error}{line_in(error, self.function.file)}"
            raise StepFailedError(
                f"reward {self.name} raised {said}", f"write {SIGNATURE}"
            ) from error
        if len(scores) != len(completions):
            raise StepFailedError(
                f"reward {self.name} returned {len(scores)} numbers for {len(completions)} answers",
                "return one number for every completion, in their order",
            )
        return [self._number(score, n, completions[n]) for n, score in enumerate(scores)]

    def _number(self, score: Any, place: int, completion: str) -> float:
        try:
            value = float(score)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise StepFailedError(
                f"reward {self.name} returned {score!r} for answer {place}: {completion[:80]!r}",
                "return a finite number for every answer, also for one that is empty or nonsense",
            )
        return value

    def _arguments(
        self, questions: Sequence[Question], completions: Sequence[str]
    ) -> dict[str, list[Any]]:
        columns = dict.fromkeys(name for question in questions for name in question.columns)
        given = {name: [question.columns.get(name) for question in questions] for name in columns}
        given |= {
            "prompts": [question.messages for question in questions],
            "completions": list(completions),
            "references": [question.reference for question in questions],
        }
        taken = _taken(self.function.call)
        return given if taken is None else {k: v for k, v in given.items() if k in taken}


def _taken(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """Names that a function takes as keywords; None when it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return tuple(p.name for p in parameters)


def load_rewards(references: Sequence[str], recipe_dir: Path) -> list[Reward]:
    """The reward functions that a recipe names.

    Raises:
        StepFailedError: There is no such file or function, or the file cannot be imported.
    """
    return [
        Reward(
            name,
            load_function(
                name,
                recipe_dir,
                who=f"reward {name}",
                error=StepFailedError,
                signature=SIGNATURE,
            ),
        )
        for name in references
    ]


def try_out(rewards: Sequence[Reward], questions: Sequence[Question]) -> None:
    """Call every reward with a few rows before a model is loaded: with their answers, and with none.

    Raises:
        StepFailedError: One raises, or does not return one number per answer.
    """
    some = list(questions[:TRIED])
    for reward in rewards:
        reward(some, [question.reference or "" for question in some])
        reward(some, [""] * len(some))
