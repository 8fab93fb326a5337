"""Rules on how a model is served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from toolkit.preflight.facts import LOCKED_ENGINES, Facts
from toolkit.preflight.verdict import Finding, refuse, rule, warn
from toolkit.recipe import Recipe

LOOPBACK = ("127.0.0.1", "localhost", "::1")

OWNED_FLAGS: Mapping[str, str] = {
    "--host": "serve.host",
    "--port": "serve.port",
    "--max-model-len": "model.max_length",
    "--context-length": "model.max_length",
    "--served-model-name": "serve.name",
    "--chat-template": "model.chat_template",
    "--trust-remote-code": "model.trust_remote_code",
    "--dtype": "serve.dtype",
    "--tensor-parallel-size": "serve.tensor_parallel",
    "--tp-size": "serve.tensor_parallel",
    "--gpu-memory-utilization": "serve.memory_fraction",
    "--mem-fraction-static": "serve.memory_fraction",
    "--max-num-seqs": "serve.max_concurrent",
    "--max-running-requests": "serve.max_concurrent",
    "--enforce-eager": "serve.eager",
    "--lora-modules": "serve.adapters",
    "--lora-paths": "serve.adapters",
    "--enable-lora": "serve.adapters",
    "--max-lora-rank": "the adapters' own rank",
    "--max-loras": "the number of adapters",
    "--max-loras-per-batch": "the number of adapters",
}
"""Flags that the toolkit sets itself -> where their value comes from."""


@rule(
    "serve.engine",
    "the engine runs on this accelerator",
    "shipped locks: vllm-cpu, vllm-cuda, sglang-cuda",
)
def engine(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """SGLang on a CPU needs AMX or a stub of its kernels."""
    if recipe.serve and (recipe.serve.engine, facts.accelerator) not in LOCKED_ENGINES:
        yield refuse(
            f"serve.engine: {recipe.serve.engine} does not run on {facts.accelerator} here",
            "set serve.engine: vllm, or run with a profile that has a GPU",
        )


@rule(
    "serve.loopback",
    "the engine listens on loopback",
    "vLLM's --api-key guards /v1, but not /tokenize, /metrics, /health",
)
def loopback(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """An open engine lets anyone read and load."""
    if recipe.serve and recipe.serve.host not in LOOPBACK:
        yield refuse(
            f"serve.host is {recipe.serve.host!r}: an engine has no sufficient authentication "
            "of its own",
            "keep serve.host: 127.0.0.1 and put a reverse proxy with authentication in front",
        )


@rule(
    "serve.tensor_parallel",
    "tensor_parallel fits the machine and the heads",
    "vLLM and SGLang cut attention by heads",
)
def tensor_parallel(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """GPUs only, and a divisor of the attention heads."""
    ways = recipe.serve.tensor_parallel if recipe.serve else 1
    if ways == 1:
        return
    if facts.accelerator == "cpu":
        yield refuse(
            f"serve.tensor_parallel is {ways}, but the model is served on a CPU",
            "set serve.tensor_parallel: 1",
        )
    heads = facts.base.number("num_attention_heads") if facts.base else None
    if heads is not None and heads % ways:
        fit = ", ".join(str(n) for n in range(1, 9) if heads % n == 0)
        yield refuse(
            f"serve.tensor_parallel is {ways}, but the base has {heads} attention heads",
            f"values that divide: {fit}",
        )


@rule(
    "serve.extra_args",
    "extra_args neither repeat the recipe, nor hold secrets, nor choose a slower kernel",
    "vllm#21376: --quantization on a checkpoint that names its own method was 5 times slower",
)
def extra_args(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Each thing is written once."""
    for text in recipe.serve.extra_args if recipe.serve else ():
        flag = text.partition("=")[0]
        if flag in OWNED_FLAGS:
            yield refuse(
                f"serve.extra_args: {flag} is set by the toolkit",
                f"it follows from {OWNED_FLAGS[flag]}; remove it here",
            )
        elif flag in ("--quantization", "-q"):
            yield refuse(
                f"serve.extra_args: {flag} overrides the method that the checkpoint names",
                "remove it; engines read the method from config.json",
            )
        elif flag == "--api-key":
            yield refuse(
                "serve.extra_args: --api-key would put a secret into the recipe, step.json and "
                "MLflow",
                "remove it; the engine stays on loopback",
            )


@rule(
    "serve.kv_cache",
    "kv_cache_gib is given only on a CPU",
    "vLLM: VLLM_CPU_KVCACHE_SPACE; on a GPU the cache follows from memory_fraction",
)
def kv_cache(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """On a GPU the key does nothing."""
    if recipe.serve and recipe.serve.kv_cache_gib is not None and facts.accelerator == "cuda":
        yield warn("serve.kv_cache_gib is not used on a GPU", "set serve.memory_fraction instead")


@rule(
    "serve.adapter_names",
    "names of served models are all different",
    "a client asks by name, so a name means one model",
)
def adapter_names(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Adapters, the trained model and the base each have their own."""
    if recipe.serve is None:
        return
    own = recipe.serve.name or recipe.name
    taken = {own: "the served model", f"{own}-base": "the base under it"}
    for adapter in recipe.serve.adapters:
        if adapter.name in taken:
            yield refuse(
                f"serve.adapters: the name {adapter.name!r} is taken by {taken[adapter.name]}",
                "give the adapter a name of its own",
            )
        taken[adapter.name] = "another adapter"


@rule(
    "serve.adapter_base",
    "adapters are loaded onto the weights they were trained on",
    "vllm#42488: AUROC 0.58 against 0.98 on a quantized base",
)
def adapter_base(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Not onto quantized or merged ones."""
    if recipe.serve is None or not recipe.serve.adapters:
        return
    labels = {q.label for q in recipe.quantize}
    for subject in recipe.served:
        if subject == "merged":
            yield refuse(
                "serve.adapters: adapters of the base would be loaded onto 'merged', which is "
                "another model",
                "serve 'base' or 'tuned' with adapters, and 'merged' in a recipe of its own",
            )
        elif subject in labels:
            yield refuse(
                f"serve.adapters: adapters would be loaded onto the quantized {subject!r}, "
                "which they were not trained on",
                "serve 'base' or 'tuned' with adapters; quantize a merged copy of each adapter "
                "instead",
            )


RULES = (engine, loopback, tensor_parallel, extra_args, kv_cache, adapter_names, adapter_base)
