"""The stored conversations: each is a way in which a server has been seen to render otherwise than training did.

All of them wait for an answer, because that is what a server renders. ``tests/unit/test_proof_conversations.py`` keeps
their names and what they must contain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LONG_TURN, VERY_LONG_TURN = 60, 1000
"""Words of the long turns: some 300 and 5,000 tokens. An engine whose context is shorter is not asked."""

SPECIAL_TOKENS = ("<|im_end|>", "<|endoftext|>", "</s>", "<s>", "[INST]", "<|eot_id|>", "<think>")
"""Written into a user's text beside the tokenizer's own: nobody may close a turn by typing it."""

THINKING = "enable_thinking"
"""Template variable of the families that can be told to think or not (Qwen3, GLM, SmolLM3 and others)."""

LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up_order",
        "description": "Find an order by its number. Größe & “quotes” stay as they are.",
        "parameters": {
            "type": "object",
            "properties": {
                "order": {"type": "string", "description": "Five digits"},
                "fields": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["order"],
        },
    },
}
"""A tool definition with nesting, a list and characters outside ASCII."""


@dataclass(frozen=True)
class Conversation:
    """Messages that wait for an answer."""

    name: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the template, beside messages and tools."""


def stored(template: str, specials: Sequence[str] = ()) -> Iterator[Conversation]:
    """The conversations for a model.

    Args:
        template: Its chat template; thinking is switched on and off where it knows how.
        specials: Its tokenizer's own special tokens.
    """
    yield Conversation("no system", _user("Where is my order 99204?"))
    yield Conversation("system", (_system("Be brief."), *_user("Where is my order 99204?")))
    yield Conversation("multi-turn", MULTI_TURN)
    yield Conversation("tools", _user("Where is my order 99204?"), (LOOK_UP,))
    yield Conversation("tool result", _tool_result(), (LOOK_UP,))
    if THINKING in template:
        for name, on in (("thinking on", True), ("thinking off", False)):
            yield Conversation(name, MULTI_TURN, kwargs={THINKING: on})
    yield Conversation("empty turn", _user(""))
    yield Conversation("long turn", _user(_long_text(LONG_TURN)))
    yield Conversation("very long turn", _user(_long_text(VERY_LONG_TURN)))
    written = " ".join(dict.fromkeys((*specials, *SPECIAL_TOKENS)))
    yield Conversation("special tokens", _user(f"Print {written} as it stands."))
    yield Conversation(
        "CJK", _user("注文番号99204はどこですか? 我的订单在哪里?주문은 어디에 있나요?")
    )
    yield Conversation(
        "emoji", _user("👩🏽\u200d💻 says 🇩🇪❤️\u200d🔥 — it's 5\u00a0€ (½ off)! e\u0301 \ufeff")
    )
    yield Conversation("white space", _user("  two spaces\n\n\ttabs \r\nand a last line \n"))


def held_out(rows: Sequence[Mapping[str, Any]], limit: int) -> Iterator[Conversation]:
    """The first rows of a dataset that end with an answer, asked for it again."""
    asked = [r for r in rows if len(r.get("messages", ())) > 1]
    for row in [r for r in asked if r["messages"][-1]["role"] == "assistant"][:limit]:
        messages, tools = tuple(row["messages"][:-1]), tuple(row.get("tools") or ())
        yield Conversation(f"held-out {row['id']}", tuple(map(_plain, messages)), tools)


def _plain(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without ``weight``, which is for training alone: a client would not send it."""
    return {key: value for key, value in message.items() if key != "weight"}


def _user(text: str) -> tuple[Mapping[str, Any], ...]:
    return ({"role": "user", "content": text},)


def _system(text: str) -> Mapping[str, Any]:
    return {"role": "system", "content": text}


def _answer(text: str) -> Mapping[str, Any]:
    return {"role": "assistant", "content": text}


MULTI_TURN = (
    _system("You answer customers."),
    *_user("Where is my order 99204?"),
    _answer("It left us on Monday.\n"),
    *_user("When does it come?"),
    _answer("Tomorrow, I think."),
    *_user("Are you sure?"),
)
"""Answers as history; the first ends with white space, which some templates strip."""


def _tool_result() -> tuple[Mapping[str, Any], ...]:
    call = {
        "id": "call_0",
        "type": "function",
        "function": {
            "name": "look_up_order",
            "arguments": {"order": "99204", "fields": ["eta", "größe"], "limit": 2, "exact": True},
        },
    }
    return (
        *_user("Where is my order 99204?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {
            "role": "tool",
            "tool_call_id": "call_0",
            "name": "look_up_order",
            "content": '{"eta": 2}',
        },
    )


def _long_text(words: int) -> str:
    """Words and numbers that do not repeat, so that no tokenizer makes one token of many."""
    return " ".join(f"{word}{n}" for n in range(words // len(_WORDS)) for word in _WORDS)


_WORDS = ("order ", "the shelf was ", "packed at ", "and No. ")
