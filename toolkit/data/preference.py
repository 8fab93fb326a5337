"""Row formats of preference and reinforcement training.

Every row is still a conversation, so that scoring, serving and calibration read it as any other::

    preference   messages end with the better answer, rejected is the worse one
    labelled     messages end with an answer, label says whether it is a good one
    prompt       messages end with a question, columns are what rewards read

Pairs may be written as TRL, UltraFeedback and HH-RLHF write them: answers as text or messages, with
the question in a column of its own or at the beginning of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from toolkit.data.formats import (
    FORMATS,
    Body,
    Formats,
    Message,
    RowError,
    RowFormat,
    conversation,
    list_of,
    parsed,
    read_messages,
    system_of,
)
from toolkit.recipe.objectives import SCORED, TRAINED_ON, Objective

BAD, GOOD = ("0", "false", "bad", "undesirable"), ("1", "true", "good", "desirable")
"""Labels as text, as CSV has them; capitals do not matter."""


def _preference(row: Mapping[str, Any]) -> Body:
    question = _question(row)
    chosen, rejected = (_answered(row[side], side) for side in ("chosen", "rejected"))
    shared = _shared(chosen, rejected)
    if shared and question and not _holds(shared, question):
        raise RowError(
            "prompt is not how chosen and rejected begin",
            "leave the question out of chosen and rejected, or give the same one in both places",
        )
    asked = shared or question
    better, worse = (side[len(shared) :] for side in (chosen, rejected))
    for name, answer in (("chosen", better), ("rejected", worse)):
        if [m["role"] for m in answer] != ["assistant"]:
            roles = ", ".join(m["role"] for m in answer) or "nothing"
            raise RowError(
                f"{name} is not one answer after the shared question, but {roles}",
                "chosen and rejected differ in one assistant message, the last",
            )
    if better[0] == worse[0]:
        raise RowError("chosen and rejected are the same answer: there is nothing to prefer")
    if not asked:
        raise RowError("there is no question", "give it as prompt, or before the answers")
    body = conversation([*system_of(row), *asked, *better], row.get("tools"))
    return {**body, "rejected": worse[0]}


def _labelled(row: Mapping[str, Any]) -> Body:
    if row.get("messages") is not None:
        turns = list_of(parsed(row["messages"], "messages"), "messages")
    elif row.get("prompt") is not None and row.get("completion") is not None:
        turns = [*_question(row), *_answered(row["completion"], "completion")]
    else:
        raise RowError("there is no answer to the label", "give prompt and completion, or messages")
    body = conversation([*system_of(row), *turns], row.get("tools"))
    return {**body, "label": _label(row["label"])}


def _prompt(row: Mapping[str, Any]) -> Body:
    messages = read_messages([*system_of(row), *_question(row)])
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise RowError("the prompt does not end with a question of the user")
    body: Body = {"messages": messages}
    if tools := parsed(row.get("tools"), "tools"):
        body["tools"] = list_of(tools, "tools")
    return body


def _label(value: Any) -> bool:
    text = str(value).strip().lower()
    if text in GOOD or text in BAD:
        return text in GOOD
    raise RowError(f"label is {value!r}", "write true for a good answer and false for a bad one")


def _question(row: Mapping[str, Any]) -> list[Message]:
    """The column ``prompt``, as text or as messages; none where there is no such column."""
    prompt = row.get("prompt")
    if prompt is None:
        return []
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowError("prompt is empty")
        return [{"role": "user", "content": prompt}]
    return read_messages(list_of(prompt, "prompt"), "prompt message")


def _answered(value: Any, side: str) -> list[Message]:
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{side} is an empty answer")
        return [{"role": "assistant", "content": value}]
    return read_messages(list_of(value, side), f"{side} message")


def _shared(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages with which both begin, up to the last that is no answer."""
    same = 0
    for ours, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
        if ours != theirs:
            break
        same += 1
    return chosen[:same]


def _holds(messages: list[Message], question: list[Message]) -> bool:
    """Whether the conversation holds the question; UltraFeedback repeats it in a column of its own."""
    said = [m["content"] for m in messages]
    return all(m["content"] in said for m in question)


_MORE = ("system", "tools")
_ALL: Formats = {
    **FORMATS,
    "preference": RowFormat(("chosen", "rejected"), ("prompt", *_MORE), _preference),
    "labelled": RowFormat(("label",), ("prompt", "completion", "messages", *_MORE), _labelled),
    "prompt": RowFormat(("prompt",), _MORE, _prompt),
}


def formats_of(objective: Objective, *, heldout: bool) -> Formats:
    """Formats that an objective reads, in the order in which they are recognised."""
    formats = {name: _ALL[name] for name in (SCORED if heldout else TRAINED_ON)[objective]}
    if objective == "grpo":
        return {name: _keeping_rest(row_format) for name, row_format in formats.items()}
    return formats


def _keeping_rest(row_format: RowFormat) -> RowFormat:
    """The same format with the columns that it does not read in the body, for reward functions."""
    known = row_format.columns + row_format.optional

    def read(row: Mapping[str, Any]) -> Body:
        rest = {str(name): value for name, value in row.items() if name not in known}
        return {**row_format.read(row), "columns": rest}

    return replace(row_format, read=read, keeps_rest=True)
