"""Keys of ``serve`` that do not go together, each with its place in an engine's source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from toolkit.recipe.serve import ServeSection


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
