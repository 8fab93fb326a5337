"""Options of ``serve`` that mean the same on every engine: one row each, as data.

An engine asks :func:`arguments` for its flags; preflight asks :func:`refusals` what an engine cannot do, and
:func:`owned_flags` which flags ``extra_args`` must leave alone. Model, port, memory, adapters and devices depend on the
deployment and stand in the engine's own module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from toolkit.engines.conflicts import CONFLICTS, Conflict
from toolkit.engines.flags import (
    Flags,
    media,
    number,
    sglang_speculative,
    switch,
    vllm_speculative,
    vllm_tools,
    whole_gib,
    word,
)
from toolkit.recipe.serve import ServeSection


@dataclass(frozen=True)
class Option:
    """A key of ``serve``, and its flags by engine."""

    key: str
    engines: Mapping[str, Flags]


def _row(key: str, vllm: Flags, sglang: Flags) -> Option:
    return Option(key, {"vllm": vllm, "sglang": sglang})


OPTIONS: tuple[Option, ...] = (
    _row("tensor_parallel", number("--tensor-parallel-size", 1), number("--tp-size", 1)),
    _row("pipeline_parallel", number("--pipeline-parallel-size", 1), number("--pp-size", 1)),
    _row("data_parallel", number("--data-parallel-size", 1), number("--dp-size", 1)),
    _row(
        "expert_parallel", switch("--enable-expert-parallel"), Flags(("--ep-size",), lambda _: [])
    ),
    _row(
        "prefix_caching",
        switch("--enable-prefix-caching", "--no-enable-prefix-caching"),
        switch(None, "--disable-radix-cache"),
    ),
    _row(
        "chunked_prefill",
        switch("--enable-chunked-prefill", "--no-enable-chunked-prefill"),
        Flags(("--chunked-prefill-size",), lambda _: []),
    ),
    _row(
        "max_batched_tokens",
        number("--max-num-batched-tokens"),
        Flags(("--chunked-prefill-size", "--max-prefill-tokens"), lambda _: []),
    ),
    _row(
        "kv_cache_type",
        word("--kv-cache-dtype", {"bf16": "bfloat16"}),
        word("--kv-cache-dtype", {"bf16": "bfloat16", "fp8": "fp8_e4m3"}),
    ),
    _row("cpu_offload_gib", number("--cpu-offload-gb"), whole_gib("--cpu-offload-gb")),
    _row(
        "kv_offload_gib",
        number("--kv-offloading-size"),
        whole_gib("--hicache-size", "--enable-hierarchical-cache"),
    ),
    _row(
        "speculative",
        Flags(("--speculative-config",), vllm_speculative),
        Flags(
            (
                *("--speculative-algorithm", "--speculative-draft-model-path"),
                *("--speculative-num-steps", "--speculative-eagle-topk"),
                *("--speculative-num-draft-tokens", "--speculative-ngram-max-bfs-breadth"),
            ),
            sglang_speculative,
        ),
    ),
    _row(
        "tool_parser",
        Flags(("--enable-auto-tool-choice", "--tool-call-parser"), vllm_tools),
        number("--tool-call-parser"),
    ),
    _row("reasoning_parser", number("--reasoning-parser"), number("--reasoning-parser")),
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
        word("--grammar-backend", {}),
    ),
    _row("multimodal", media("--limit-mm-per-prompt"), media("--limit-mm-data-per-request")),
    _row("seed", number("--seed"), number("--random-seed")),
    _row(
        "log_requests",
        switch("--enable-log-requests"),
        switch("--log-requests"),
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
        argv += option.engines[engine].render(getattr(serve, option.key))
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
        flag: f"serve.{option.key}" for option in OPTIONS for flag in option.engines[engine].names
    }


def refusals(
    engine: str, serve: ServeSection, *, adapters: bool, version: tuple[int, ...] = ()
) -> Iterator[Conflict]:
    """What an engine cannot do of what the recipe asks, before anything is started.

    Args:
        engine: ``vllm`` or ``sglang``.
        serve: The recipe's section.
        adapters: Whether adapters are loaded onto the served model.
        version: Of the engine; the newest that is locked unless given.
    """
    for conflict in CONFLICTS:
        if conflict.engine in (None, engine) and conflict.holds(serve, adapters, version):
            yield conflict
