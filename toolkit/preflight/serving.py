"""Rules on how a model is served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from toolkit.engines.options import owned_flags, refusals
from toolkit.engines.parsers import command_line
from toolkit.preflight.facts import LOCKED_ENGINES, Facts
from toolkit.preflight.verdict import Finding, refuse, rule, warn
from toolkit.recipe import Recipe
from toolkit.recipe.quantize import QuantizeSection

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
    "set serve.engine: vllm, or run with a GPU",
)
def engine(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """SGLang on a CPU needs AMX or a stub of its kernels."""
    if recipe.serve and (facts.engine, facts.accelerator) not in LOCKED_ENGINES:
        yield refuse(
            f"serve.engine: {facts.engine} does not run on {facts.accelerator} here",
            "set serve.engine: vllm, or run with a profile that has a GPU",
        )


@rule(
    "serve.loopback",
    "beyond loopback, clients are known: the front asks for keys or tokens",
    "vLLM's --api-key guards /v1, but not /tokenize, /metrics, /health; SGLang's admin routes load "
    "weights",
    "toolkit keys create, and serve.front.keys: true; or serve.front.jwt",
)
def loopback(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Engines listen on loopback always; this is about the front's address."""
    serve = recipe.serve
    if serve is None or serve.host in LOOPBACK or serve.front.keys or serve.front.jwt:
        return
    yield refuse(
        f"serve.host is {serve.host!r}, and anyone who reaches it could ask the model",
        "set serve.front.keys: true and make a key with `toolkit keys create` (or set "
        "serve.front.jwt), or keep serve.host: 127.0.0.1",
    )


@rule(
    "serve.front",
    "keys for tokens come over an encrypted connection",
    "RFC 8725, 3.10: do not trust received claims",
    "use https, a file, or http on loopback",
)
def front(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Whoever is on the way could put keys of their own into a JWKS that comes over plain HTTP."""
    section = recipe.serve.front if recipe.serve else None
    if section and section.jwt and _is_plain_http(section.jwt.jwks or ""):
        yield refuse(
            f"serve.front.jwt.jwks: {section.jwt.jwks} is not encrypted: anyone on the way could "
            "put keys of their own there",
            "use https, a file, or http on loopback",
        )


def _is_plain_http(url: str) -> bool:
    host = url.removeprefix("http://").partition("/")[0].rpartition(":")[0] or url
    return url.startswith("http://") and host.strip("[]") not in LOOPBACK


@rule(
    "serve.engines",
    "engines of other hosts are reached over a network that is yours",
    "vLLM and SGLang ask nobody who he is on /tokenize and /metrics; vllm-router sends them no key",
    "use a network that this host alone reaches, or an SSH tunnel to a port on loopback",
)
def engines(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Prompts, answers and orders to load adapters go to them as they are."""
    for url in recipe.serve.engines if recipe.serve else ():
        if _is_plain_http(url):
            yield warn(
                f"serve.engines: {url} is reached without encryption, and whoever reaches it needs no key",
                "use a network that this host alone reaches, or an SSH tunnel to a port on loopback",
            )


@rule(
    "serve.replicas",
    "every replica has GPUs of its own",
    "nvidia-smi; vLLM and SGLang take whole GPUs",
    "lower serve.replicas or serve.tensor_parallel, or add GPUs",
)
def replicas(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Replicas, times the GPUs of each."""
    serve, gpu = recipe.serve, facts.gpu
    if serve is None or gpu is None:
        return
    each = serve.tensor_parallel * serve.pipeline_parallel * serve.data_parallel
    if serve.replicas * each > gpu.count:
        fit = max(1, gpu.count // each)
        smaller = "" if each <= gpu.count else f", and serve.tensor_parallel: {gpu.count}"
        yield refuse(
            f"serve.replicas {serve.replicas} with {each} GPUs each takes {serve.replicas * each} "
            f"GPUs, but there {'is' if gpu.count == 1 else 'are'} {gpu.count}",
            f"set serve.replicas: {fit}{smaller}",
        )


@rule(
    "serve.tensor_parallel",
    "tensor_parallel fits the machine and the heads",
    "vLLM and SGLang cut attention by heads",
    "take a divisor of the attention heads",
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
    "extra_args are flags of this engine, and neither repeat the recipe, nor hold secrets, nor choose "
    "a slower kernel",
    "engines/parsers: the engine's own parser, by version; vllm#21376: --quantization on a "
    "checkpoint that names its own method was 5 times slower",
    "remove the flag; the recipe has a key for it",
    ("vllm 0.32.0", "vllm 0.26.0", "sglang 0.5.17", "sglang 0.5.23"),
)
def extra_args(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Each thing is written once, and a flag that the engine lacks is found before it starts."""
    given = recipe.serve.extra_args if recipe.serve else ()
    refused = [one for text in given for one in _flag(facts, text.partition("=")[0])]
    yield from refused
    if given and not refused and facts.engine_version:
        line = command_line(facts.engine, facts.engine_version)
        for problem in line.problems(given):
            yield refuse(
                f"serve.extra_args: {problem}",
                f"look it up in `{facts.engine} --help`, or remove it",
                f"parser of {line.engine} {line.version}",
            )


def _flag(facts: Facts, flag: str) -> Iterator[Finding]:
    owned = {**owned_flags(facts.engine), **OWNED_FLAGS}
    if flag in owned:
        yield refuse(
            f"serve.extra_args: {flag} is set by the toolkit",
            f"it follows from {owned[flag]}; remove it here",
        )
    elif flag in ("--quantization", "-q"):
        yield refuse(
            f"serve.extra_args: {flag} overrides the method that the checkpoint names",
            "remove it; engines read the method from config.json",
        )
    elif flag == "--api-key":
        yield refuse(
            "serve.extra_args: --api-key would put a secret into the recipe, step.json and MLflow",
            "remove it; the engine stays on loopback",
        )


@rule(
    "serve.adapter_names",
    "names of served models are all different",
    "a client asks by name, so a name means one model",
    "give the adapter a name of its own",
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
    "serve 'base' or 'tuned' with adapters",
)
def adapter_base(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Not onto merged ones; onto quantized ones when those are the base's."""
    if recipe.serve is None or not recipe.serve.adapters:
        return
    sections = {q.label: q for q in recipe.quantize}
    for subject in recipe.served:
        if subject == "merged" or (subject == "tuned" and _is_full(recipe)):
            yield refuse(
                f"serve.adapters: adapters of the base would be loaded onto {subject!r}, which is "
                "another model",
                "serve 'base' or 'tuned' with adapters, and 'merged' in a recipe of its own",
            )
        elif subject in sections and _is_of_base(recipe, sections[subject]):
            yield warn(
                f"serve.adapters: {subject!r} is the base in fewer bits, which adapters were not "
                "trained on",
                "set serve.proof.agreement: required, so that a loss is found before traffic; or "
                "serve 'base' with the adapters",
            )
        elif subject in sections:
            yield refuse(
                f"serve.adapters: adapters would be loaded onto the quantized {subject!r}, which "
                "holds the trained weights already",
                "serve 'base' or 'tuned' with adapters; or quantize the base in a recipe without "
                "train, and serve that with adapters",
            )


def _is_full(recipe: Recipe) -> bool:
    return recipe.train is not None and recipe.train.method == "full"


def _is_of_base(recipe: Recipe, section: QuantizeSection) -> bool:
    """Quantized from the plain base: nothing is trained, or the section says so."""
    return recipe.train is None or getattr(section, "of", "merged") == "base"


@rule(
    "serve.options",
    "the engine has every option that the recipe sets, and they go together",
    "engines/conflicts.py: each with its place in the engine's source",
    "remove the key, or take the engine that has it",
)
def options(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Data that the engines' own command lines are written from."""
    if recipe.serve is None:
        return
    found = refusals(
        facts.engine,
        recipe.serve,
        adapters=_has_adapters(recipe),
        version=facts.engine_version,
    )
    for one in found:
        yield refuse(
            one.text if one.key in one.text else f"{one.key}: {one.text}", one.fix, one.source
        )


def _has_adapters(recipe: Recipe) -> bool:
    """Whether the served model has adapters, or room for some."""
    serve = recipe.serve
    trains = recipe.train is not None and recipe.train.method != "full"
    tuned = trains and recipe.serves_trained_adapter
    return serve is not None and (bool(serve.adapters) or serve.adapter_slots is not None or tuned)


RULES = (
    engines,
    engine,
    loopback,
    front,
    tensor_parallel,
    replicas,
    extra_args,
    adapter_names,
    adapter_base,
    options,
)
