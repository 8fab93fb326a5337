"""How engines are told an option: arguments made of a value, for the shapes that flags have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.recipe.serve import MultimodalSection, SpeculativeSection

Render = Callable[[Any], list[str]]


@dataclass(frozen=True)
class Flags:
    """How an engine is told an option.

    Attributes:
        names: Every flag that may come out of ``render``.
        render: The option's value -> arguments; none where the value is the engine's own default.
    """

    names: tuple[str, ...]
    render: Render


def number(flag: str, default: Any = None) -> Flags:
    """A flag with a value, left out when the value is ``default``."""
    return Flags((flag,), lambda value: [] if value == default else [flag, _plain(value)])


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def switch(on: str | None, off: str | None = None) -> Flags:
    """A flag for yes, one for no, nothing for ``auto``."""
    names = {True: on, False: off}

    def render(value: Any) -> list[str]:
        name = names.get(value) if isinstance(value, bool) else None
        return [name] if name else []

    return Flags(tuple(name for name in (on, off) if name), render)


def word(flag: str, words: Mapping[str, str]) -> Flags:
    """A flag whose values have names of their own in this engine; ``auto`` says nothing."""
    return Flags((flag,), lambda value: [flag, words.get(value, value)] if value != "auto" else [])


def whole_gib(flag: str, *before: str) -> Flags:
    """A flag that takes whole GiB: rounded up, so that what was asked for fits."""
    names = (*(name for name in before if name.startswith("--")), flag)
    return Flags(names, lambda v: [*before, flag, str(-int(-v // 1))] if v is not None else [])


def media(flag: str) -> Flags:
    """A JSON object of limits per request."""
    words = {"images": "image", "videos": "video", "audios": "audio"}

    def render(value: MultimodalSection) -> list[str]:
        limits = {
            words[key]: count for key, count in value.model_dump().items() if count is not None
        }
        return [flag, json.dumps(limits)] if limits else []

    return Flags((flag,), render)


def vllm_tools(value: str | None) -> list[str]:
    """The parser, and the switch without which vLLM does not use it."""
    return ["--enable-auto-tool-choice", "--tool-call-parser", value] if value else []


NGRAM_WINDOW = 4
"""Tokens at the end of the text that vLLM looks for earlier in it; it has no default."""


def vllm_speculative(value: SpeculativeSection | None) -> list[str]:
    """One JSON object."""
    if value is None:
        return []
    config: dict[str, Any] = {
        "method": {"draft": "draft_model"}.get(value.method, value.method),
        "num_speculative_tokens": value.tokens,
    }
    if value.model is None:
        config["prompt_lookup_max"] = NGRAM_WINDOW
    else:
        config["model"] = value.model
    return ["--speculative-config", json.dumps(config)]


SGLANG_METHODS = {"ngram": "NGRAM", "draft": "STANDALONE", "eagle": "EAGLE", "eagle3": "EAGLE3"}

SGLANG_BREADTH = 10
"""SGLang's default of ``--speculative-ngram-max-bfs-breadth``."""


def sglang_speculative(value: SpeculativeSection | None) -> list[str]:
    """A chain of guesses, as in vLLM: SGLang counts the token that is certain among those it checks."""
    if value is None:
        return []
    argv = ["--speculative-algorithm", SGLANG_METHODS[value.method]]
    if value.model is not None:
        argv += ["--speculative-draft-model-path", value.model]
        argv += ["--speculative-num-steps", str(value.tokens), "--speculative-eagle-topk", "1"]
    elif value.tokens + 1 < SGLANG_BREADTH:  # steps are tokens // breadth, and none would be left
        argv += ["--speculative-ngram-max-bfs-breadth", str(value.tokens + 1)]
    return [*argv, "--speculative-num-draft-tokens", str(value.tokens + 1)]
