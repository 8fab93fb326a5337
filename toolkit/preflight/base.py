"""Rules on the base model and on training it."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.preflight.architectures import known
from toolkit.preflight.facts import Facts
from toolkit.preflight.verdict import Finding, refuse, rule, warn
from toolkit.recipe import Recipe
from toolkit.recipe.model import SourceKind, parse_source


@rule(
    "model.readable",
    "a local base is a folder with config.json and safetensors, or a GGUF file",
    "design: safetensors only",
    "point model.source at a model folder",
)
def readable(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """The folder or file is there, and holds safetensors."""
    if facts.source_problem:
        yield refuse(
            f"model.source: {facts.source_problem}",
            "point model.source at a model folder with config.json and *.safetensors, relative "
            "to the recipe",
        )


@rule(
    "model.pinned",
    "the base cannot change under the recipe",
    "design: a served model is the trained one",
    "write a version, a revision or a digest",
)
def pinned(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """An alias moves; a wheel may be built again. A Hub id without a revision is no recipe."""
    source = parse_source(recipe.model.source)
    if source.kind is SourceKind.mlflow and "@" in source.location:
        yield warn(
            f"model.source: the alias in {source.location!r} can move to another version",
            "write models:/NAME/VERSION, or commit toolkit.lock and run with --frozen",
        )
    if source.kind is SourceKind.pypi and recipe.model.sha256 is None:
        yield warn(
            f"model.sha256 is missing: nothing checks the file from {recipe.model.source!r}",
            "add model.sha256 with the digest of the file",
        )


@rule(
    "model.remote_code",
    "a base that brings Python code is trusted in so many words",
    "design: trust_remote_code is off",
    "read the code, then set model.trust_remote_code with a pinned revision",
)
def remote_code(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """A config.json with ``auto_map`` names Python files of the model."""
    if facts.base and facts.base.config.get("auto_map") and not recipe.model.trust_remote_code:
        yield refuse(
            "model: config.json has auto_map: the base needs Python code that comes with it",
            "read that code, then set model.trust_remote_code: true with a pinned revision, or "
            "take another base",
        )


@rule(
    "model.complete",
    "the base's weights are all there",
    "huggingface/safetensors: format; model.safetensors.index.json",
    "copy or download the base again",
)
def complete(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """A half-copied shard is shorter than its header promises."""
    for name in facts.base.missing if facts.base else ():
        yield refuse(
            f"model: the index names {name}, which is not there", "copy or download it again"
        )
    for one in facts.base.weights if facts.base else ():
        if one.problem:
            yield refuse(f"model: {one.path.name} {one.problem}", "copy or download it again")


@rule(
    "model.architecture",
    "the engine has code for this architecture",
    "architectures.json: read from vllm/model_executor/models and sglang/srt/models",
    "take a base of an architecture that the engine has, or another engine",
)
def architecture(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Without it engines fall back to the code of Transformers: slower, and not for every model."""
    table = known(facts.engine, facts.engine_version)
    name = facts.base.architecture if facts.base else None
    if recipe.serve is None or table is None or name is None or name in table.architectures:
        return
    other = known("sglang" if facts.engine == "vllm" else "vllm", (9999,))
    elsewhere = f"; {other.source} has" if other and name in other.architectures else ""
    yield warn(
        f"model: {table.source} has no code of its own for {name}{elsewhere}; it will try that of "
        "Transformers, which is slower",
        "try the recipe with a short `toolkit serve` first, or take another engine or base",
        table.source,
    )


@rule(
    "model.template",
    "conversations can be rendered",
    "transformers: apply_chat_template raises without a template",
    "set model.chat_template",
)
def template(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """A base without a chat template cannot be trained on conversations."""
    if facts.template is False and recipe.model.chat_template is None and recipe.data is not None:
        if all(source.format == "text" for source in recipe.data.sources):
            return
        yield refuse(
            "model: the base has no chat template, and the recipe gives none",
            "set model.chat_template to a Jinja file; it is then used in training, evaluation "
            "and serving alike",
        )


@rule(
    "model.quantized_base",
    "a base that is quantized already is neither merged into nor quantized again",
    "measured: merging into 4-bit weights changed top-1 tokens (KL 0.067); peft#2321, "
    "transformers#31293",
    "take the full-precision base",
)
def quantized_base(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Merge drift, and quantization errors on top of quantization errors."""
    method = (facts.base.quantization or {}).get("quant_method") if facts.base else None
    if method is None:
        return
    fix = (
        "take the full-precision base; for training in little memory use train.method: qlora on it"
    )
    if recipe.train is not None:
        yield refuse(f"train: the base is quantized already ({method})", fix)
    if recipe.quantize:
        yield refuse(f"quantize: the base is quantized already ({method})", fix)


@rule(
    "train.engine_scale",
    "the engine scales the trained adapter as training did",
    "sglang#40835 (open, 2026-09): use_rslora is ignored, the update is sqrt(rank) too weak",
    "serve it merged, or with vLLM",
)
def engine_scale(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """SGLang serves an rsLoRA adapter sqrt(rank) times too weak, without an error; PiSSA's is made a plain one."""
    if not (recipe.train and recipe.train.lora.rslora and _serves_adapter(recipe, facts, "sglang")):
        return
    if recipe.train.lora.is_pissa:
        return
    rank = recipe.train.lora.rank
    yield refuse(
        f"train.lora.rslora: sglang ignores it and would serve the adapter {rank**0.5:.3g} "
        f"times too weak (rank {rank})",
        "set serve.models: [merged], or serve.engine: vllm, or train.lora.rslora: false with "
        "alpha times sqrt(rank)",
    )


@rule(
    "train.qlora_served",
    "an adapter is served on the weights it was trained on",
    "measured: a merge into the dequantized weights equals the QLoRA forward (3e-5)",
    "serve the merged model, or gate on the evaluation",
)
def qlora_served(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """QLoRA trains against NF4 weights; an engine puts the adapter on the full-precision base."""
    if (
        recipe.train
        and recipe.train.method == "qlora"
        and recipe.train.lora.init != "loftq"  # train.loftq_served refuses that
        and "tuned" in recipe.served
        and recipe.serve
    ):
        yield warn(
            "serve.models: 'tuned' puts an adapter trained on 4-bit weights onto the "
            "full-precision base",
            "serve 'merged', which is merged into the weights that training saw, or gate on the "
            "evaluation of 'tuned'",
        )


def _serves_adapter(recipe: Recipe, facts: Facts, engine: str) -> bool:
    serves = recipe.serve is not None and facts.engine == engine
    return (
        serves
        and "tuned" in recipe.served
        and recipe.train is not None
        and recipe.train.method != "full"
    )


RULES = (
    readable,
    pinned,
    remote_code,
    complete,
    architecture,
    template,
    quantized_base,
    engine_scale,
    qlora_served,
)
