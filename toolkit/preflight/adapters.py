"""Rules on adapters that are loaded into an engine: the recipe's own and finished ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.preflight.facts import AdapterFacts, Facts
from toolkit.preflight.verdict import Finding, refuse, rule, warn
from toolkit.recipe import Recipe
from toolkit.recipe.model import SourceKind, parse_source

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``--max-lora-rank`` that vLLM takes (config/lora.py: MaxLoRARanks)."""

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Initialisations that leave the base weights alone (vLLM 0.32, lora/peft_helper.py)."""

_HELPER = "vllm 0.32.0, lora/peft_helper.py: _validate_features"
_MERGE = "merge it into the base and serve the merged model without adapters"


@dataclass(frozen=True)
class Feature:
    """A PEFT feature that no engine serves as training saw it."""

    id: str
    found: Callable[[Mapping[str, Any]], object]
    """Something to show, or nothing when the adapter does not use it."""
    message: str
    fix: str = _MERGE
    source: str = _HELPER


def _saved_modules(config: Mapping[str, Any]) -> object:
    return [m for m in config.get("modules_to_save") or () if m not in ("classifier", "score")]


def _changed_base(config: Mapping[str, Any]) -> object:
    init = config.get("init_lora_weights", True)
    return init if isinstance(init, str) and init.lower() not in PLAIN_INITS else None


FEATURES = (
    Feature("dora", lambda c: c.get("use_dora"), "uses DoRA"),
    Feature("modules_to_save", _saved_modules, "has whole layers in modules_to_save: {value}"),
    Feature(
        "bias",
        lambda c: c.get("bias", "none") not in ("none", None) and c["bias"],
        "trains biases: bias {value!r}",
    ),
    Feature("lora_bias", lambda c: c.get("lora_bias"), "has a bias in its LoRA layers (lora_bias)"),
    Feature(
        "init",
        _changed_base,
        "was started with init_lora_weights {value!r}, which changes the base weights",
        "convert it with PEFT's path_initial_model_for_weight_conversion, or " + _MERGE,
    ),
    Feature(
        "alora",
        lambda c: c.get("alora_invocation_tokens"),
        "is an activated LoRA (alora_invocation_tokens)",
    ),
    Feature(
        "layer_replication",
        lambda c: c.get("layer_replication"),
        "replicates layers (layer_replication)",
    ),
    Feature("bdlora", lambda c: c.get("use_bdlora"), "is block-diagonal (use_bdlora)"),
    Feature("qalora", lambda c: c.get("use_qalora"), "is a QALoRA"),
)
"""Engines refuse these with HTTP 500, or drop them in silence (SGLang checks no keys)."""


def _readable(facts: Facts) -> Iterator[tuple[str, AdapterFacts]]:
    for name, adapter in facts.adapters.items():
        if adapter.problem is None:
            yield f"serve.adapters {name}", adapter


@rule(
    "adapter.readable",
    "adapter folders have adapter_config.json and adapter_model.safetensors",
    "PEFT's layout; design: safetensors only",
)
def readable(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Each folder of ``serve.adapters``."""
    for name, adapter in facts.adapters.items():
        if adapter.problem:
            yield refuse(
                f"serve.adapters {name}: {adapter.folder} {adapter.problem}",
                "point path at a PEFT adapter folder, relative to the recipe",
            )


@rule("adapter.kind", "adapters are LoRA", "vLLM and SGLang load LoRA only")
def kind(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """``peft_type`` is LORA."""
    for where, adapter in _readable(facts):
        found = str(adapter.config.get("peft_type", "LORA"))
        if found.upper() != "LORA":
            yield refuse(f"{where}: is {found}, and engines load LORA only", _MERGE)


@rule("adapter.features", "adapters use no feature that engines lack", _HELPER)
def features(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """DoRA, modules_to_save, bias, PiSSA and the like: see :data:`FEATURES`."""
    engine = recipe.serve.engine if recipe.serve else "vllm"
    for where, adapter in _readable(facts):
        for feature in FEATURES:
            if value := feature.found(adapter.config):
                yield refuse(
                    f"{where}: {feature.message.format(value=value)}; {engine} does not serve that",
                    feature.fix,
                )


@rule("adapter.rank", "adapter ranks fit the engine's slots", "vllm, config/lora.py: MaxLoRARanks")
def rank(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """At most 512, and every slot is as large as the next rank that vLLM knows."""
    if recipe.serve is None:
        return
    ranks = {where: adapter.rank for where, adapter in _readable(facts)}
    if recipe.train and recipe.train.method != "full" and "tuned" in recipe.served:
        ranks["train.lora.rank"] = recipe.train.lora.rank
    for where, value in ranks.items():
        yield from _rank(where, value, recipe.serve.engine)


def _rank(where: str, value: int, engine: str) -> Iterator[Finding]:
    if value < 1:
        yield refuse(
            f"{where}: the adapter's rank is {value}", "look at r in its adapter_config.json"
        )
    elif engine == "vllm" and value > VLLM_RANKS[-1]:
        yield refuse(
            f"{where}: rank {value} is above {VLLM_RANKS[-1]}, the largest that vLLM serves",
            "train with a lower rank, or " + _MERGE,
        )
    elif engine == "vllm" and value not in VLLM_RANKS:
        slot = next(r for r in VLLM_RANKS if r >= value)
        yield warn(
            f"{where}: rank {value} is served in slots of rank {slot}",
            f"rank {slot} costs the same memory in vLLM",
        )


@rule(
    "adapter.patterns",
    "one rank and one alpha for the whole adapter, where the engine knows no patterns",
    "vllm 0.26 does not read rank_pattern and alpha_pattern; sglang, lora/lora.py: one scaling",
)
def patterns(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Engines that ignore the patterns serve another model, in silence."""
    engine = recipe.serve.engine if recipe.serve else "vllm"
    if engine == "vllm" and facts.engine_version >= (0, 32):
        return
    for where, adapter in _readable(facts):
        for key in ("rank_pattern", "alpha_pattern"):
            if adapter.config.get(key):
                version = ".".join(map(str, facts.engine_version))
                yield refuse(
                    f"{where}: has a {key}, which {engine} {version} does not read",
                    f"serve it with vllm 0.32 or newer, or {_MERGE}",
                )


@rule(
    "adapter.scale", "the engine scales an adapter as training did", "sglang#40835 (open, 2026-09)"
)
def scale(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """SGLang ignores ``use_rslora``."""
    if recipe.serve is None or recipe.serve.engine != "sglang":
        return
    for where, adapter in _readable(facts):
        if adapter.config.get("use_rslora"):
            yield refuse(
                f"{where}: uses rsLoRA, which sglang serves sqrt(rank) times too weak",
                f"set serve.engine: vllm, or {_MERGE}",
            )


@rule(
    "adapter.vocabulary",
    "adapters add no tokens",
    "sglang, lora/lora_config.py: added tokens beyond the vocabulary of the base",
)
def vocabulary(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Only tokens beyond the base's vocabulary count: tokenizers copy the base's list."""
    if recipe.serve is None or recipe.serve.engine != "sglang":
        return
    known = (facts.base.number("vocab_size") if facts.base else None) or 0
    for where, adapter in _readable(facts):
        new = [t for t, number in adapter.added_tokens.items() if number >= known]
        if new:
            yield refuse(
                f"{where}: adds {len(new)} tokens, which sglang refuses",
                _MERGE,
            )


@rule(
    "adapter.shape",
    "the adapter was trained on a model of this width",
    "header of adapter_model.safetensors: lora_A is [rank, width]",
)
def shape(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """The hidden state is read by q, k, v, gate and up: second axis of their ``lora_A``."""
    hidden = facts.base.number("hidden_size") if facts.base else None
    if hidden is None:
        return
    for where, adapter in _readable(facts):
        for name, dims in adapter.shapes.items():
            reads_hidden = any(
                f".{m}.lora_A" in name
                for m in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
            )
            if reads_hidden and len(dims) == 2 and dims[1] != hidden:
                yield refuse(
                    f"{where}: was trained on hidden size {dims[1]}, but the base has {hidden}",
                    "use the base that the adapter was trained on",
                )
                break


@rule(
    "adapter.base",
    "the adapter was trained on this base",
    "adapter_config.json: base_model_name_or_path",
)
def base(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Only Hub ids can be compared: folders have no identity by name."""
    source = parse_source(recipe.model.source)
    if source.kind is not SourceKind.hub:
        return
    for where, adapter in _readable(facts):
        trained_on = str(adapter.config.get("base_model_name_or_path") or "")
        if (
            trained_on.count("/") == 1
            and not trained_on.startswith((".", "/"))
            and trained_on != source.location
        ):
            yield warn(
                f"{where}: was trained on {trained_on!r}, but model.source is {source.location!r}",
                "make sure that both are the same weights",
            )


RULES = (readable, kind, features, rank, patterns, scale, vocabulary, shape, base)
