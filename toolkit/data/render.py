"""From conversation to tokens and loss mask, through the model's own chat template.

The mask needs nothing of the template (no ``{% generation %}``): an answer is what stands between
the template's prompt for it and the end of its turn, and both are rendered by the template itself::

    prompt_i = template(messages before answer i, add_generation_prompt)   what a server sends
    done_i   = template(messages up to and with answer i)                  what it should become
    answer i = done_i without prompt_i, up to its stop token

Template and tokenizer of the model decide everything; this module never writes a control token.
``docs/adr/0008-loss-mask-from-rendering.md`` says why this way.

Legend: N tokens of a sequence, C characters of its text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

from toolkit.data.formats import Message
from toolkit.errors import DataError

Template = Callable[[Sequence[Message], bool], str]
"""``(messages, add_generation_prompt) -> text``."""

SHOWN = 60
"""Characters of a rendered text that an error shows."""


class TemplateError(DataError):
    """What the chat template asks for is not what it shows as an answer."""


class Span(NamedTuple):
    """Characters ``[start, end)`` of a text."""

    start: int
    end: int


@dataclass(frozen=True)
class View:
    """A conversation up to an answer, as one training sequence.

    Attributes:
        messages: The conversation up to and with the last answer that is trained here.
        text: ``messages`` rendered, [C] characters.
        answers: Where the answers trained in this view stand in ``text``, stop token and what
            follows it included.
    """

    messages: list[Message]
    text: str
    answers: tuple[Span, ...]


def last_view(messages: Sequence[Message], template: Template) -> View:
    """Render a conversation of which only the last answer counts: the better one of a pair, say.

    A conversation that ends with a question is rendered as a server does it, waiting for an answer.

    Raises:
        TemplateError: The text that asks for the answer is not how the answered text begins.
    """
    last = len(messages) - 1
    if messages[last]["role"] != "assistant":
        return View(list(messages), template(messages, True), ())
    text = template(messages, False)
    asked = _asked(template(messages[:last], True), text, last)
    return View(list(messages), text, (Span(asked, len(text)),))


def views(messages: Sequence[Message], template: Template) -> list[View]:
    """Render a conversation so that each answer is trained once, in the context a server gives it.

    Most templates need one view: the whole conversation. A template that shows an answer
    differently once it is history (Qwen3 drops earlier reasoning) needs one more for each answer
    that looked different when it was given; there the answer ends the view. The longest view comes
    first. Answers with ``weight: 0`` are not trained.

    Raises:
        TemplateError: The text that asks for an answer is not how the answered text begins.
    """
    pending = [
        n for n, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1) != 0
    ]
    done = {n: template(messages[: n + 1], False) for n in pending}
    asked = {n: _asked(template(messages[:n], True), done[n], n) for n in pending}
    found: list[View] = []
    while pending:
        last, text = pending[-1], done[pending[-1]]
        here = [n for n in pending if text.startswith(done[n])]
        spans = tuple(Span(asked[n], len(done[n])) for n in here)
        found.append(View(list(messages[: last + 1]), text, spans))
        pending = [n for n in pending if n not in here]
    return found


def _asked(prompt: str, done: str, message: int) -> int:
    if done.startswith(prompt):
        return len(prompt)
    same = next(
        (n for n, (a, b) in enumerate(zip(prompt, done, strict=False)) if a != b), len(done)
    )
    raise TemplateError(
        f"message {message + 1}: the chat template asks for this answer with "
        f"...{prompt[same:][:SHOWN]!r} "
        f"but shows the answer as ...{done[same:][:SHOWN]!r} "
        f"(they part at character {same}): a model "
        "trained on the second would be served with the first",
        "use a template whose prompt is the beginning of its answer: set model.chat_template",
    )


class Mask(NamedTuple):
    """Which tokens of a sequence are trained."""

    ranges: list[tuple[int, int]]
    """Token ranges ``[start, end)``, one per answer; empty ranges are left out."""
    stops: list[int]
    """Token positions of the trained stop tokens."""
    joined: int
    """Answers whose first token began in the prompt; that token is not trained."""


def mask(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    text: str,
    answers: Sequence[Span],
    stop_ids: AbstractSet[int],
) -> Mask:
    """Map answers to tokens; a token is trained when all of it belongs to the answer.

    Args:
        ids: [N] token ids of ``text``.
        offsets: [N] characters of each token, from the fast tokenizer; starts never decrease.
        text: [C] rendered text.
        answers: From :class:`View`.
        stop_ids: Ids that can end a turn. After the last of them in an answer only white space may
            follow, which is the template's and is not trained.
    """
    ranges, stops, joined = [], [], 0
    for answer in answers:
        start, end = (bisect_left(offsets, (place,)) for place in answer)
        joined += 0 < start < len(ids) and offsets[start - 1][1] > answer.start
        if start < end and offsets[end - 1][1] > answer.end:
            end -= 1
        last = end - 1
        while last >= start and ids[last] not in stop_ids and _blank(text, offsets[last]):
            last -= 1
        if last >= start and ids[last] in stop_ids:
            end = last + 1
            stops.append(last)
        if start < end:
            ranges.append((start, end))
    return Mask(ranges, stops, joined)


def _blank(text: str, characters: tuple[int, int]) -> bool:
    return not text[slice(*characters)].strip()


# --- with a tokenizer of transformers -------------------------------------------------------------


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages with ``system`` in front where they bring no system message of their own."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def template_of(tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None = None) -> Template:
    """The chat template of a tokenizer, for conversations with these tools."""

    def render(messages: Sequence[Message], ask: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=ask, tokenize=False
        )
        return text

    return render


def prompt_messages(row: Mapping[str, Any], system: str | None = None) -> list[Message]:
    """The question of a row: everything before its last answer; all of it where none is given.

    Raises:
        DataError: The row is plain text and asks nothing.
    """
    if "messages" not in row:
        raise DataError(
            f"row {row.get('id')} is plain text: it has no question to answer",
            "score plain text by perplexity",
        )
    messages = row["messages"]
    answered = messages[-1]["role"] == "assistant"  # rows end with an answer, or with a question
    return with_system(messages[:-1] if answered else messages, system)


def prompt_ids(tokenizer: Any, row: Mapping[str, Any], system: str | None = None) -> list[int]:
    """Token ids of a row's question as a server renders it, generation prompt included.

    Rows of a dataset artifact hold ``data.system`` already; ``system`` is for rows from elsewhere.
    """
    return question_ids(tokenizer, prompt_messages(row, system), row.get("tools"))


def question_ids(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[int]:
    """Token ids of messages that wait for an answer, as a server renders them; ``kwargs`` go to the template."""
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages),
        tools=tools,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **kwargs,
    )
    return ids


def reference(row: Mapping[str, Any]) -> str:
    """The last answer of a row: its content, else its tool calls as JSON; or the plain text."""
    import json

    if "messages" not in row:
        return str(row["text"])
    answer = next(m for m in reversed(row["messages"]) if m["role"] == "assistant")
    if answer["content"] or "tool_calls" not in answer:
        return str(answer["content"])
    return json.dumps([call["function"] for call in answer["tool_calls"]], ensure_ascii=False)
