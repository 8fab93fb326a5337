"""Row formats: whatever a row looks like, it becomes a conversation or a text.

A body is ``{"messages": [{"role", "content", ...}, ...], "tools": [...]?}`` or ``{"text": str}``.
Rows for other objectives are conversations as well, with more beside: the worse answer (``rejected``),
whether the answer is good (``label``), or the columns that rewards read (``columns``); see
``preference.py``. So whatever scores, serves or calibrates on rows knows all of them.
The columns of the first row of a source decide its format when the recipe says ``auto``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.errors import DataError
from toolkit.registry import close_match

Body = dict[str, Any]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    **{role: role for role in ROLES},
}


class RowError(DataError):
    """One row cannot be read as its format; the message has no location, the reader adds it."""


@dataclass(frozen=True)
class RowFormat:
    """How rows of one format are read."""

    columns: tuple[str, ...]
    """Columns that every row must have."""
    optional: tuple[str, ...]
    """Columns that are read where they are."""
    read: Callable[[Mapping[str, Any]], Body]
    keeps_rest: bool = False
    """Whether other columns are kept in the body."""


Formats = Mapping[str, RowFormat]
"""By name, in the order in which they are recognised."""


def recognise(row: Mapping[str, Any], where: str, formats: Formats | None = None) -> str:
    """Name the format of a source by the columns of its first row.

    Args:
        row: The first row.
        where: Its place, for the error.
        formats: Those that may be meant, in the order in which they are tried; without it the
            formats of supervised fine-tuning.

    Raises:
        DataError: No format has these columns; the message lists what was seen and what is known.
    """
    formats = formats or FORMATS
    for name, row_format in formats.items():
        if all(column in row for column in row_format.columns):
            return name
    known = "; ".join(f"{name} ({', '.join(f.columns)})" for name, f in formats.items())
    seen = ", ".join(map(repr, row)) or "none"
    raise DataError(
        f"{where}: no row format has these columns: {seen}",
        f"known formats: {known}; rename columns with `columns: {{theirs: ours}}`",
    )


def read_row(row: Mapping[str, Any], name: str, formats: Formats | None = None) -> Body:
    """Turn a row into a body.

    Raises:
        RowError: A column is missing or holds something else than the format says.
    """
    row_format = (formats or FORMATS)[name]
    for column in row_format.columns:
        if row.get(column) is None:
            near = close_match(column, row)
            raise RowError(
                f"column {column!r} is missing{near}; {name} needs {', '.join(row_format.columns)}",
                f"columns here: {', '.join(map(repr, row))}; rename with `columns`",
            )
    body = row_format.read(row)
    _encodable(body)
    return body


def ignored_columns(
    row: Mapping[str, Any], name: str, formats: Formats | None = None
) -> tuple[str, ...]:
    """Columns that the format does not read."""
    row_format = (formats or FORMATS)[name]
    read = row_format.columns + row_format.optional
    return () if row_format.keeps_rest else tuple(c for c in row if c not in read)


def _encodable(body: Body) -> None:
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "the text holds half of a surrogate pair, which is not valid Unicode",
            "write the file again as UTF-8, or remove the character",
        ) from error
    except (TypeError, ValueError) as error:
        raise RowError(f"the row holds a value that JSON cannot: {error}") from error


# --- conversations --------------------------------------------------------------------------------


def conversation(messages: Iterable[Any], tools: Any = None) -> Body:
    """Check messages and put them into a body.

    Messages after the last answer are cut: nothing in them is trained, and a held-out row ends with
    its reference.

    Raises:
        RowError: A message is malformed, the assistant speaks first, or it never answers.
    """
    read = read_messages(messages)
    answers = [n for n, m in enumerate(read) if m["role"] == "assistant"]
    if not answers:
        raise RowError(
            "no message is from the assistant: there is nothing to learn",
            f"roles here: {', '.join(m['role'] for m in read) or 'none'}",
        )
    if answers[0] == 0:
        raise RowError(
            "the assistant speaks first: there is no question",
            "put a user message before it, or remove it",
        )
    body: Body = {"messages": read[: answers[-1] + 1]}
    if given := parsed(tools, "tools"):
        body["tools"] = list_of(given, "tools")
    return body


def read_messages(values: Iterable[Any], what: str = "message") -> list[Message]:
    """Check every message by itself.

    Raises:
        RowError: A message is malformed.
    """
    return [_message(value, f"{what} {n}") for n, value in enumerate(values, start=1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(f"{where} is {_kind(value)}, not an object with role and content")
    if "role" not in value:
        raise RowError(
            f"{where} has no 'role'{close_match('role', value)}; its keys are {_keys(value)}"
        )
    role = value["role"]
    if role not in ROLES:
        raise RowError(
            f"{where} has the role {role!r}{close_match(str(role), ROLES)}",
            f"roles are {', '.join(ROLES)}",
        )
    # Fields that are null come from Parquet, where every message has the fields of all: they were
    # never there.
    message = {key: v for key, v in value.items() if v is not None}
    message["content"] = _text(value.get("content"), where)
    if calls := parsed(value.get("tool_calls"), f"{where}: tool_calls"):
        message["tool_calls"] = [
            _tool_call(c, where) for c in list_of(calls, f"{where}: tool_calls")
        ]
    else:
        message.pop("tool_calls", None)
    if role == "assistant" and not message["content"].strip() and not calls:
        raise RowError(f"{where} is an empty answer")
    if message.get("weight", 1) not in (0, 1):
        raise RowError(f"{where} has weight {message['weight']!r}; 1 trains the answer, 0 does not")
    return message


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part, where) for part in content)
    raise RowError(f"{where}: content is {_kind(content)}, not text")


def _part(part: Any, where: str) -> str:
    if (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    ):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
    raise RowError(f"{where}: a content part is {kind!r}; only 'text' parts can be trained")


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call as templates want it: arguments are an object, as servers make it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"{where}: a tool call has no function name")
    arguments = parsed(
        function.get("arguments") or {}, f"{where}: arguments of {function['name']!r}"
    )
    if not isinstance(arguments, Mapping):
        raise RowError(
            f"{where}: arguments of {function['name']!r} are {_kind(arguments)}, not an object"
        )
    identity = {"id": call["id"]} if call.get("id") else {}
    return {
        **identity,
        "type": "function",
        "function": {"name": function["name"], "arguments": dict(arguments)},
    }


# --- readers --------------------------------------------------------------------------------------


def _messages(row: Mapping[str, Any]) -> Body:
    return conversation(list_of(parsed(row["messages"], "messages"), "messages"), row.get("tools"))


def _sharegpt(row: Mapping[str, Any]) -> Body:
    turns = list_of(parsed(row["conversations"], "conversations"), "conversations")
    messages = [_sharegpt_turn(turn, f"message {n}") for n, turn in enumerate(turns, start=1)]
    return conversation([*system_of(row), *messages], row.get("tools"))


def _sharegpt_turn(turn: Any, where: str) -> Any:
    if not isinstance(turn, Mapping) or "role" in turn:
        return turn
    missing = [key for key in ("from", "value") if key not in turn]
    if missing:
        raise RowError(f"{where} has no {missing[0]!r}; its keys are {_keys(turn)}")
    if turn["from"] not in SHAREGPT_ROLES:
        raise RowError(f"{where} is from {turn['from']!r}", f"known: {', '.join(SHAREGPT_ROLES)}")
    if turn["from"] == "function_call":
        call = parsed(turn["value"], f"{where}: function_call")
        calls = call if isinstance(call, list) else [call]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _prompt_completion(row: Mapping[str, Any]) -> Body:
    prompt, completion = row["prompt"], row["completion"]
    question = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = (
        [{"role": "assistant", "content": completion}]
        if isinstance(completion, str)
        else completion
    )
    turns = [*list_of(question, "prompt"), *list_of(answer, "completion")]
    return conversation([*system_of(row), *turns], row.get("tools"))


def _alpaca(row: Mapping[str, Any]) -> Body:
    messages = list(system_of(row))
    for n, pair in enumerate(
        list_of(parsed(row.get("history") or [], "history"), "history"), start=1
    ):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history {n} is {_kind(pair)}, not a question and an answer")
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    question = _string(row["instruction"], "instruction")
    if extra := _string(row.get("input") or "", "input"):
        question = f"{question}\n\n{extra}"
    answer = _string(row["output"], "output")
    return conversation(
        [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    )


def _plain(row: Mapping[str, Any]) -> Body:
    text = _string(row["text"], "text")
    if not text.strip():
        raise RowError("the text is empty")
    return {"text": text}


def system_of(row: Mapping[str, Any]) -> list[Message]:
    """The column ``system`` as messages, none or one."""
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def parsed(value: Any, what: str) -> Any:
    """A value that may be JSON in a string (CSV has nothing else).

    Raises:
        RowError: It is text that is not JSON.
    """
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(f"{what} is text that is not JSON: {error}") from error


def list_of(value: Any, what: str) -> list[Any]:
    """``value`` where it is a list; null is an empty one.

    Raises:
        RowError: It is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError(f"{what} is {_kind(value)}, not a list")
    return value


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{what} is {_kind(value)}, not text")
    return value


def _kind(value: Any) -> str:
    return {
        "NoneType": "null",
        "dict": "an object",
        "list": "a list",
        "str": "text",
        "bool": "a boolean",
        "int": "a number",
        "float": "a number",
    }.get(type(value).__name__, type(value).__name__)


def _keys(value: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, value)) or "none"


_MORE = ("system", "tools")
FORMATS: Formats = {
    "messages": RowFormat(("messages",), ("tools",), _messages),
    "sharegpt": RowFormat(("conversations",), _MORE, _sharegpt),
    "prompt_completion": RowFormat(("prompt", "completion"), _MORE, _prompt_completion),
    "alpaca": RowFormat(("instruction", "output"), ("input", "system", "history"), _alpaca),
    "text": RowFormat(("text",), (), _plain),
}
"""Formats of supervised fine-tuning; ``preference.py`` has those of other objectives."""
