"""Rules on memory: the weights, the KV cache and the adapters against the machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

from toolkit.forecast import parts
from toolkit.forecast.parts import GIB, Fit, gib
from toolkit.forecast.serving import (
    RESERVE_BYTES,
    Ask,
    Forecast,
    forecast,
    held_against,
    kv_bytes_per_token,
)
from toolkit.forecast.shape import ModelShape
from toolkit.preflight.adapters import VLLM_RANKS
from toolkit.preflight.base_facts import BaseFacts, shape_of
from toolkit.preflight.facts import Facts
from toolkit.preflight.formats import WeightFormat, format_of
from toolkit.preflight.verdict import Finding, refuse, rule, warn
from toolkit.recipe import Recipe
from toolkit.recipe.recipe import ON
from toolkit.recipe.serve import ServeSection

SHRINKS = {
    WeightFormat.w4a16: 0.29,
    WeightFormat.bnb: 0.29,
    WeightFormat.w8a16: 0.53,
    WeightFormat.w8a8: 0.51,
    WeightFormat.fp8: 0.51,
}
"""Bytes of quantized linear layers as a share of bf16, scales included (group size 64 or 128)."""


def _weight_bytes(recipe: Recipe, base: BaseFacts, subject: str) -> int | None:
    """Of the served subject: a quantized copy is smaller in its linear layers."""
    whole = base.weight_bytes
    section = next((q for q in recipe.quantize if q.label == subject.removeprefix(ON)), None)
    if whole is None or section is None:
        return whole
    vocabulary, hidden = base.number("vocab_size") or 0, base.number("hidden_size") or 0
    kept = vocabulary * hidden * base.dtype_bytes * (1 if base.is_tied else 2)
    return int(kept + max(0, whole - kept) * SHRINKS[format_of(section)])


def _ask(recipe: Recipe, serve: ServeSection, facts: Facts, subject: str) -> Ask | None:
    base, gpu = facts.base, facts.gpu
    weights = _weight_bytes(recipe, base, subject) if base else None
    if weights is None or gpu is None or gpu.memory_bytes is None:
        return None
    ranks = adapter_ranks(recipe, facts, subject)
    return Ask(
        weight_bytes=weights // serve.pipeline_parallel,
        gpu_bytes=gpu.memory_bytes,
        fraction=serve.memory_fraction,
        context=recipe.model.max_length,
        concurrent=serve.max_concurrent,
        slots=_slots(serve, len(ranks)),
        rank=_slot_rank(serve.max_rank or max(ranks.values(), default=0), facts.engine),
        tensor_parallel=serve.tensor_parallel,
        kv_bytes=1 if serve.kv_cache_type.startswith("fp8") else 2,
    )


def adapter_ranks(recipe: Recipe, facts: Facts, subject: str = "tuned") -> dict[str, int]:
    """Rank of every adapter that is loaded, by the key of the recipe that gives it."""
    ranks = {
        f"serve.adapters {name}": adapter.rank
        for name, adapter in facts.adapters.items()
        if adapter.problem is None
    }
    trains = recipe.train if recipe.train and recipe.train.method != "full" else None
    if trains and subject == "tuned" and "tuned" in recipe.served:
        ranks["train.lora.rank"] = trains.lora.served_rank
    return ranks


def _slots(serve: ServeSection, adapters: int) -> int:
    """As the engines are started (engines/__init__.py: Deployment.slots)."""
    if serve.adapter_slots:
        return serve.adapter_slots
    return adapters + serve.live_adapters if adapters else 0


def _slot_rank(rank: int, engine: str) -> int:
    return next((r for r in VLLM_RANKS if r >= rank), rank) if engine == "vllm" else rank


@rule(
    "serve.memory",
    "weights, one request of full length and the adapters fit into the GPU",
    "vllm, v1/worker/gpu_worker.py: determine_available_memory; v1/core/kv_cache_utils.py refuses "
    "to start with less than one request's cache; forecast/serving.py has the formulas",
    "fewer tokens, more GPUs, a quantized model or a larger memory_fraction",
)
def memory(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Numbers in GiB, for one GPU."""
    shape = shape_of(facts.base) if facts.base else None
    if recipe.serve is None or shape is None or facts.accelerator != "cuda":
        return
    for subject in recipe.served:
        ask = _ask(recipe, recipe.serve, facts, subject)
        if ask is None:
            continue
        now = forecast(shape, ask)
        if not now.fits:
            yield refuse(
                f"serve {subject}: {_numbers(now, ask)}", "; or ".join(_fixes(shape, ask, facts))
            )
        elif now.tokens < ask.context * ask.concurrent:
            together = now.tokens // ask.context
            yield warn(
                f"serve {subject}: the KV cache holds {now.tokens} tokens: {together} requests of "
                f"{ask.context} tokens, not serve.max_concurrent {ask.concurrent}; more wait",
                f"set serve.max_concurrent: {max(1, together)}, or model.max_length: "
                f"{_round_down(now.tokens // ask.concurrent)}, if all requests are that long",
            )


def served(recipe: Recipe, facts: Facts, subject: str) -> tuple[parts.Forecast, Fit] | None:
    """Memory of a served model in parts; ``None`` where too little is known."""
    shape = shape_of(facts.base) if facts.base else None
    ask = _ask(recipe, recipe.serve, facts, subject) if recipe.serve else None
    return held_against(forecast(shape, ask), ask) if shape and ask else None


def _numbers(now: Forecast, ask: Ask) -> str:
    parts = [f"weights {gib(now.weights)}"]
    parts += [f"{ask.slots} LoRA slots of rank {ask.rank} {gib(now.slots)}"] if ask.slots else []
    parts += [f"activations about {gib(now.activations + RESERVE_BYTES)}"]
    parts += [f"KV cache of {ask.context} tokens {gib(now.context)}"]
    return (
        f"{' + '.join(parts)} = {gib(now.fixed + now.context)} GiB, but {ask.fraction:g} of "
        f"{gib(ask.gpu_bytes)} GiB is {gib(now.budget)}"
    )


def _fixes(shape: ModelShape, ask: Ask, facts: Facts) -> Iterator[str]:
    """Changes after each of which it fits."""
    shorter = _longest_context(shape, ask)
    if shorter:
        yield f"set model.max_length: {shorter}"
    if ask.fraction < 0.95 and forecast(shape, replace(ask, fraction=0.95)).fits:
        yield "set serve.memory_fraction: 0.95"
    heads = (facts.base.number("num_attention_heads") if facts.base else None) or 1
    more = (n for n in (2, 4, 8) if heads % n == 0 and n > ask.tensor_parallel)
    fits = (n for n in more if forecast(shape, replace(ask, tensor_parallel=n)).fits)
    if ways := next(fits, None):
        here = facts.gpu.count if facts.gpu else 1
        where = "" if ways <= here else f" on a machine with {ways} GPUs"
        yield f"set serve.tensor_parallel: {ways}{where}"
    if forecast(shape, replace(ask, weight_bytes=int(ask.weight_bytes * 0.35))).fits:
        yield "quantize to 4 bits (method gptq) and serve that"
    if not shorter:
        least = ceil(
            (forecast(shape, ask).fixed + forecast(shape, ask).context) / ask.fraction / GIB
        )
        yield f"take a GPU with at least {least} GiB"


def _longest_context(shape: ModelShape, ask: Ask) -> int | None:
    """The longest context that fits, in round numbers; ``None`` below 512 tokens."""
    context = _round_down(ask.context // 2)
    while context >= 512:
        if forecast(shape, replace(ask, context=context)).fits:
            return context
        context //= 2
    return None


def _round_down(tokens: int) -> int:
    return max(1, tokens // 256 * 256) if tokens >= 256 else max(1, tokens)


@rule(
    "serve.max_rank",
    "the room for adapters holds every adapter",
    "engines/__init__.py: Deployment; vllm, config/lora.py: max_lora_rank",
    "set serve.max_rank to the largest rank, or leave it out",
)
def max_rank(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """The recipe may make room for adapters that come later; then it says how large they are."""
    serve = recipe.serve
    if serve is None:
        return
    ranks = adapter_ranks(recipe, facts)
    if serve.adapter_slots and not ranks and not serve.max_rank:
        yield refuse(
            "serve.adapter_slots makes room for adapters, but there is none to read the rank from",
            "set serve.max_rank to the largest rank that will come",
        )
    for where, value in ranks.items():
        if serve.max_rank and value > serve.max_rank:
            yield refuse(
                f"serve.max_rank is {serve.max_rank}, but {where} has rank {value}",
                f"set serve.max_rank: {value}, or leave it out",
            )


@rule(
    "serve.memory_in_use",
    "the GPU has the memory that the engine will ask for",
    "vllm, v1/worker/utils.py: request_memory refuses to start; nvidia-smi",
    "stop what holds the memory, or lower serve.memory_fraction",
)
def memory_in_use(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """What other processes hold while the plan is made may be gone when the engine starts: a warning."""
    gpu = facts.gpu
    if recipe.serve is None or gpu is None or gpu.memory_bytes is None or not gpu.used_bytes:
        return
    wanted = recipe.serve.memory_fraction * gpu.memory_bytes
    free = gpu.memory_bytes - gpu.used_bytes
    if free < wanted:
        share = int(free / gpu.memory_bytes * 100) / 100
        yield warn(
            f"serve.memory_fraction {recipe.serve.memory_fraction:g} is {gib(int(wanted))} GiB, "
            f"but {gib(free)} of {gib(gpu.memory_bytes)} GiB are free now: the engine would not "
            "start",
            f"stop what holds {gib(gpu.used_bytes)} GiB, or set serve.memory_fraction: {share:g}",
        )


@rule(
    "serve.kv_cache",
    "on a CPU, kv_cache_gib holds one request of full length; on a GPU it is not given",
    "vLLM: --kv-cache-memory-bytes; v1/core/kv_cache_utils.py: check_enough_kv_cache_memory",
    "raise serve.kv_cache_gib or lower model.max_length",
    ("vllm 0.32.0 cpu",),
)
def kv_cache(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """VLLM does not start when the longest request would not fit."""
    serve = recipe.serve
    if serve is None:
        return
    if facts.accelerator == "cuda":
        if serve.kv_cache_gib is not None:
            yield warn(
                "serve.kv_cache_gib is not used on a GPU", "set serve.memory_fraction instead"
            )
        return
    shape = shape_of(facts.base) if facts.base else None
    if shape is None or facts.base is None:
        return
    each = 4 if serve.dtype == "fp32" else 2
    given = int((serve.kv_cache_gib or 1.0) * GIB)
    needed = kv_bytes_per_token(shape, bytes_each=each) * recipe.model.max_length
    if needed > given:
        tokens = given // kv_bytes_per_token(shape, bytes_each=each)
        yield refuse(
            f"serve.kv_cache_gib is {given / GIB:g}, but one request of {recipe.model.max_length} "
            f"tokens takes {gib(needed)} GiB",
            f"set serve.kv_cache_gib: {ceil(needed / GIB * 10) / 10:g}, or model.max_length: "
            f"{_round_down(tokens)}",
        )


RULES = (memory, max_rank, memory_in_use, kv_cache)
