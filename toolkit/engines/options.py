"""Options of ``serve`` that mean the same on every engine: one row each, as data.

An engine asks :func:`arguments` for its flags; preflight asks :func:`refusals` what an engine cannot do, and
:func:`owned_flags` which flags ``extra_args`` must leave alone. Model, port, memory, adapters and devices depend on the
deployment and stand in the engine's own module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.recipe.serve import MultimodalSection, ServeSection, SpeculativeSection

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


@dataclass(frozen=True)
class Lack:
    """An engine does not have an option, or not with this value.

    Attributes:
        reason: What it lacks, as the end of ``sglang ...``.
        fix: What to do instead.
    """

    reason: str
    fix: str


@dataclass(frozen=True)
class Option:
    """A key of ``serve``: its flags by engine, or why there are none."""

    key: str
    engines: Mapping[str, Flags | Lack]

    def value(self, serve: ServeSection) -> Any:
        """What the recipe says."""
        return getattr(serve, self.key)


@dataclass(frozen=True)
class Refusal:
    """Something that an engine cannot do.

    Attributes:
        key: Dotted key of the recipe, such as ``serve.speculative``.
        text: What is wrong, with both values.
        fix: What to do.
        source: Where the engine says so.
    """

    key: str
    text: str
    fix: str
    source: str


def _number(flag: str, default: Any = None) -> Flags:
    """A flag with a value, left out when the value is ``default``."""
    return Flags((flag,), lambda value: [] if value == default else [flag, _plain(value)])


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _switch(on: str | None, off: str | None = None) -> Flags:
    """A flag for yes, one for no, nothing for ``auto``."""
    names = {True: on, False: off}

    def render(value: Any) -> list[str]:
        name = names.get(value) if isinstance(value, bool) else None
        return [name] if name else []

    return Flags(tuple(name for name in (on, off) if name), render)


def _word(flag: str, words: Mapping[str, str]) -> Flags:
    """A flag whose values have names of their own in this engine; ``auto`` says nothing."""
    return Flags((flag,), lambda value: [flag, words.get(value, value)] if value != "auto" else [])


def _whole_gib(flag: str, *before: str) -> Flags:
    """A flag that takes whole GiB: rounded up, so that what was asked for fits."""
    names = (*(name for name in before if name.startswith("--")), flag)
    return Flags(names, lambda v: [*before, flag, str(-int(-v // 1))] if v is not None else [])


def _media(flag: str) -> Flags:
    """A JSON object of limits per request."""
    words = {"images": "image", "videos": "video", "audios": "audio"}

    def render(value: MultimodalSection) -> list[str]:
        limits = {
            words[key]: count for key, count in value.model_dump().items() if count is not None
        }
        return [flag, json.dumps(limits)] if limits else []

    return Flags((flag,), render)


def _vllm_tools(value: str | None) -> list[str]:
    return ["--enable-auto-tool-choice", "--tool-call-parser", value] if value else []


NGRAM_WINDOW = 4
"""Tokens at the end of the text that vLLM looks for earlier in it; it has no default."""


def _vllm_speculative(value: SpeculativeSection | None) -> list[str]:
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


def _sglang_speculative(value: SpeculativeSection | None) -> list[str]:
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


def _row(key: str, vllm: Flags | Lack, sglang: Flags | Lack) -> Option:
    return Option(key, {"vllm": vllm, "sglang": sglang})


OPTIONS: tuple[Option, ...] = (
    _row("tensor_parallel", _number("--tensor-parallel-size", 1), _number("--tp-size", 1)),
    _row("pipeline_parallel", _number("--pipeline-parallel-size", 1), _number("--pp-size", 1)),
    _row("data_parallel", _number("--data-parallel-size", 1), _number("--dp-size", 1)),
    _row(
        "expert_parallel", _switch("--enable-expert-parallel"), Flags(("--ep-size",), lambda _: [])
    ),
    _row(
        "prefix_caching",
        _switch("--enable-prefix-caching", "--no-enable-prefix-caching"),
        _switch(None, "--disable-radix-cache"),
    ),
    _row(
        "chunked_prefill",
        _switch("--enable-chunked-prefill", "--no-enable-chunked-prefill"),
        Flags(("--chunked-prefill-size",), lambda _: []),
    ),
    _row(
        "max_batched_tokens",
        _number("--max-num-batched-tokens"),
        Flags(("--chunked-prefill-size", "--max-prefill-tokens"), lambda _: []),
    ),
    _row(
        "kv_cache_type",
        _word("--kv-cache-dtype", {"bf16": "bfloat16"}),
        _word("--kv-cache-dtype", {"bf16": "bfloat16", "fp8": "fp8_e4m3"}),
    ),
    _row("cpu_offload_gib", _number("--cpu-offload-gb"), _whole_gib("--cpu-offload-gb")),
    _row(
        "kv_offload_gib",
        _number("--kv-offloading-size"),
        _whole_gib("--hicache-size", "--enable-hierarchical-cache"),
    ),
    _row(
        "speculative",
        Flags(("--speculative-config",), _vllm_speculative),
        Flags(
            (
                *("--speculative-algorithm", "--speculative-draft-model-path"),
                *("--speculative-num-steps", "--speculative-eagle-topk"),
                *("--speculative-num-draft-tokens", "--speculative-ngram-max-bfs-breadth"),
            ),
            _sglang_speculative,
        ),
    ),
    _row(
        "tool_parser",
        Flags(("--enable-auto-tool-choice", "--tool-call-parser"), _vllm_tools),
        _number("--tool-call-parser"),
    ),
    _row("reasoning_parser", _number("--reasoning-parser"), _number("--reasoning-parser")),
    _row(
        "structured_output",
        Flags(
            ("--structured-outputs-config",),
            lambda value: (
                []
                if value == "auto"
                else [
                    "--structured-outputs-config",
                    json.dumps({"backend": {"llguidance": "guidance"}.get(value, value)}),
                ]
            ),
        ),
        _word("--grammar-backend", {}),
    ),
    _row("multimodal", _media("--limit-mm-per-prompt"), _media("--limit-mm-data-per-request")),
    _row("seed", _number("--seed"), _number("--random-seed")),
    _row(
        "log_requests",
        _switch("--enable-log-requests"),
        _switch("--log-requests"),
    ),
)
"""Every row, in the order in which flags are written."""


def arguments(engine: str, serve: ServeSection, draft: Path | None = None) -> list[str]:
    """The flags of every option that the recipe sets.

    Args:
        engine: ``vllm`` or ``sglang``.
        serve: The recipe's section; :func:`refusals` has nothing to say about it.
        draft: Where ``serve.speculative.model`` lies.
    """
    if serve.speculative and draft:
        spoken = serve.speculative.model_copy(update={"model": str(draft)})
        serve = serve.model_copy(update={"speculative": spoken})
    argv: list[str] = []
    for option in OPTIONS:
        how = option.engines[engine]
        if isinstance(how, Flags):
            argv += how.render(option.value(serve))
    return argv + (_sglang_together(serve) if engine == "sglang" else [])


def _sglang_together(serve: ServeSection) -> list[str]:
    """SGLang's flags that follow from two keys."""
    argv = []
    if serve.expert_parallel:
        argv += ["--ep-size", str(serve.tensor_parallel)]
    if serve.chunked_prefill is False:
        argv += ["--chunked-prefill-size", "-1"]
        if serve.max_batched_tokens:
            argv += ["--max-prefill-tokens", str(serve.max_batched_tokens)]
    elif serve.max_batched_tokens:
        argv += ["--chunked-prefill-size", str(serve.max_batched_tokens)]
    return argv


def owned_flags(engine: str) -> dict[str, str]:
    """Flags that the toolkit writes from typed options -> the key they come from."""
    return {
        flag: f"serve.{option.key}"
        for option in OPTIONS
        if isinstance(how := option.engines[engine], Flags)
        for flag in how.names
    }


def refusals(
    engine: str, serve: ServeSection, *, adapters: bool, version: tuple[int, ...] = ()
) -> Iterator[Refusal]:
    """What an engine cannot do of what the recipe asks, before anything is started.

    Args:
        engine: ``vllm`` or ``sglang``.
        serve: The recipe's section.
        adapters: Whether adapters are loaded onto the served model.
        version: Of the engine; the newest that is locked unless given.
    """
    for option in OPTIONS:
        how = option.engines[engine]
        if isinstance(how, Lack) and option.value(serve) != _default(option.key):
            yield Refusal(
                f"serve.{option.key}",
                f"serve.{option.key} is set, but {engine} {how.reason}",
                how.fix,
                f"{engine} --help",
            )
    for conflict in CONFLICTS:
        if conflict.engine in (None, engine) and conflict.holds(serve, adapters, version):
            yield Refusal(conflict.key, conflict.text, conflict.fix, conflict.source)


def _default(key: str) -> Any:
    return ServeSection.model_fields[key].default


@dataclass(frozen=True)
class Conflict:
    """Keys that do not go together; ``engine`` is ``None`` where no engine takes them."""

    engine: str | None
    key: str
    holds: Callable[[ServeSection, bool, tuple[int, ...]], bool]
    text: str
    fix: str
    source: str


def _speculates(serve: ServeSection, *methods: str) -> bool:
    return serve.speculative is not None and serve.speculative.method in methods


CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        "sglang",
        "serve.speculative",
        lambda serve, adapters, version: (
            adapters
            and (0,) < version < (0, 5, 23)
            and _speculates(serve, "draft", "eagle", "eagle3")
        ),
        "this SGLang takes adapters with the speculative method ngram only",
        "set serve.speculative.method: ngram, serve the merged model, or set serve.engine: vllm",
        "sglang 0.5.17 server_args.py: LoRA is only compatible with NGRAM speculative decoding",
    ),
    Conflict(
        "sglang",
        "serve.speculative",
        lambda serve, adapters, version: (
            adapters and not (0,) < version < (0, 5, 23) and _speculates(serve, "draft")
        ),
        "SGLang does not guess with a draft model under adapters",
        "set serve.speculative.method: ngram, serve the merged model, or set serve.engine: vllm",
        "sglang 0.5.23 arg_groups/lora_hook.py: check_lora_speculative_compatibility",
    ),
    Conflict(
        "sglang",
        "serve.kv_offload_gib",
        lambda serve, *_: serve.kv_offload_gib is not None and serve.prefix_caching is False,
        "SGLang keeps earlier KV cache in the machine's memory only with prefix caching",
        "remove serve.prefix_caching: false, or serve.kv_offload_gib",
        "sglang server_args.py: --enable-hierarchical-cache and --disable-radix-cache",
    ),
    Conflict(
        None,
        "serve.expert_parallel",
        lambda serve, *_: (
            serve.expert_parallel and serve.tensor_parallel == 1 and serve.data_parallel == 1
        ),
        "serve.expert_parallel spreads experts over GPUs, but the model has one GPU",
        "set serve.tensor_parallel to the number of GPUs, or remove serve.expert_parallel",
        "vllm docs, expert parallel: the size is tensor_parallel x data_parallel",
    ),
    Conflict(
        "sglang",
        "serve.data_parallel",
        lambda serve, adapters, _: adapters and serve.live_adapters and serve.data_parallel > 1,
        "SGLang loads and unloads no adapters while it runs with data_parallel",
        "set serve.replicas instead of serve.data_parallel, or serve.live_adapters: false",
        "sglang tokenizer_control_mixin.py: dp_size must be 1 for dynamic lora loading",
    ),
)
"""Every one is in the source of the engine that is named."""
