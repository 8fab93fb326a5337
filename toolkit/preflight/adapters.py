"""Rules on adapters that are loaded into an engine: what their configuration says."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.preflight.adapter_facts import AdapterFacts
from toolkit.preflight.architectures import known
from toolkit.preflight.facts import Facts
from toolkit.preflight.features import FEATURES, MERGE, Does, row_of
from toolkit.preflight.verdict import Finding, Outcome, refuse, rule, warn
from toolkit.recipe import Recipe
from toolkit.recipe.model import SourceKind, parse_source

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``--max-lora-rank`` that vLLM takes (config/lora.py: MaxLoRARanks)."""

ON_ENGINES = ("vllm 0.32.0 cpu", "vllm 0.26.0 cuda", "sglang 0.5.17 cuda")


def readable_adapters(facts: Facts) -> Iterator[tuple[str, AdapterFacts]]:
    """Adapters whose folders can be read, with the key of the recipe that names them."""
    for name, adapter in facts.adapters.items():
        if adapter.problem is None:
            yield f"serve.adapters {name}", adapter


@rule(
    "adapter.readable",
    "adapter folders have adapter_config.json and a whole adapter_model.safetensors",
    "PEFT's layout; huggingface/safetensors: format; design: safetensors only",
    "point path at the folder that the export stage or PEFT wrote, or copy it again",
    ON_ENGINES,
)
def readable(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Each folder of ``serve.adapters``; a file shorter than its header promises is truncated."""
    for name, adapter in facts.adapters.items():
        if not adapter.problem:
            continue
        again = "truncated" in adapter.problem or "empty" in adapter.problem
        fix = (
            "copy or export the adapter again"
            if again
            else "point path at a PEFT adapter folder, relative to the recipe"
        )
        yield refuse(f"serve.adapters {name}: {adapter.folder} {adapter.problem}", fix)


@rule("adapter.kind", "adapters are LoRA", "vLLM and SGLang load LoRA only", MERGE)
def kind(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """``peft_type`` is LORA."""
    for where, adapter in readable_adapters(facts):
        found = str(adapter.config.get("peft_type", "LORA"))
        if found.upper() != "LORA":
            yield refuse(f"{where}: is {found}, and engines load LORA only", MERGE)


@rule(
    "adapter.features",
    "adapters use no feature that the engine refuses, drops or serves otherwise",
    "table below: one row per feature, engine and version",
    MERGE,
    ON_ENGINES,
)
def features(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """DoRA, modules_to_save, bias, PiSSA, rank patterns and the like: see ``features.py``."""
    for where, adapter in readable_adapters(facts):
        for feature in FEATURES.values():
            value = feature.found(adapter)
            row = row_of(feature.id, facts.engine, facts.engine_version) if value else None
            if row is None or row.outcome is Outcome.ok:
                continue
            does = "does not serve that" if row.does is Does.refuses else row.does
            message = feature.message.format(value=value)
            yield refuse(f"{where}: {message}; {facts.engine_name} {does}", row.fix, row.source)


@rule(
    "adapter.rank",
    "adapter ranks fit the engine's slots",
    "vllm, config/lora.py: MaxLoRARanks",
    "train with a rank of 8, 16, 32, 64, 128, 256, 320 or 512",
    ON_ENGINES,
)
def rank(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """At most 512, and every slot is as large as the next rank that vLLM knows."""
    if recipe.serve is None:
        return
    ranks = {where: adapter.rank for where, adapter in readable_adapters(facts)}
    if recipe.train and recipe.train.method != "full" and recipe.serves_trained_adapter:
        lora = recipe.train.lora
        twice = f", twice for {lora.init}" if lora.is_pissa else ""
        ranks[f"train.lora.rank{twice}"] = lora.served_rank
    for where, value in ranks.items():
        yield from _rank(where, value, facts.engine)


def _rank(where: str, value: int, engine: str) -> Iterator[Finding]:
    if value < 1:
        yield refuse(
            f"{where}: the adapter's rank is {value}", "look at r in its adapter_config.json"
        )
    elif engine == "vllm" and value > VLLM_RANKS[-1]:
        yield refuse(
            f"{where}: rank {value} is above {VLLM_RANKS[-1]}, the largest that vLLM serves",
            "train with a lower rank, or " + MERGE,
        )
    elif engine == "vllm" and value not in VLLM_RANKS:
        slot = next(r for r in VLLM_RANKS if r >= value)
        yield warn(
            f"{where}: rank {value} is served in slots of rank {slot}",
            f"rank {slot} costs the same memory in vLLM",
        )


@rule(
    "adapter.slots",
    "adapters of very different ranks do not share an engine",
    "vllm, lora/layers/base_linear.py: every slot has the largest rank (--max-lora-rank)",
    "serve the adapter of high rank merged, or in a recipe of its own",
)
def slots(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """One adapter of rank 256 makes every slot 32 times larger than an adapter of rank 8 needs."""
    ranks = {name: a.rank for name, a in facts.adapters.items() if a.rank > 0}
    if not ranks:
        return
    largest, least = max(ranks, key=ranks.__getitem__), min(ranks, key=ranks.__getitem__)
    if ranks[largest] >= 8 * ranks[least] and ranks[largest] >= 128:
        yield warn(
            f"serve.adapters: {largest!r} has rank {ranks[largest]}, {least!r} rank "
            f"{ranks[least]}: every slot takes the memory of rank {ranks[largest]}",
            f"merge {largest!r} into a model of its own, or train it with a lower rank",
        )


@rule(
    "adapter.architecture",
    "the engine puts adapters on this architecture",
    "architectures.json: read from vllm/model_executor/models and sglang/srt/models",
    MERGE,
)
def architecture(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Some models have no LoRA in vLLM at all, many none on the embeddings."""
    table = known(facts.engine, facts.engine_version)
    name = facts.base.architecture if facts.base else None
    if table is None or name is None or not _serves_adapters(recipe):
        return
    if name not in table.architectures:
        return  # the Transformers backend takes it, adapters too
    if name not in table.lora:
        yield refuse(f"serve: {table.source} has no adapters for {name}", MERGE, table.source)
        return
    for where, adapter in readable_adapters(facts):
        found = sorted(adapter.targets & {"embed_tokens", "lm_head"})
        if found and name not in table.embeddings:
            yield refuse(
                f"{where}: is on {', '.join(found)}, and {table.source} takes no adapter there "
                f"for {name}",
                f"train without {', '.join(found)} among the targets, or {MERGE}",
            )


def _serves_adapters(recipe: Recipe) -> bool:
    if recipe.serve is None:
        return False
    trained = recipe.train is not None and recipe.train.method != "full"
    return bool(recipe.serve.adapters) or (trained and recipe.serves_trained_adapter)


@rule(
    "adapter.vocabulary",
    "adapters add no tokens",
    "sglang, lora/lora_manager.py: validate_new_adapter; vllm, lora/lora_model.py: "
    "lora_embedding_A must have the base's vocabulary",
    MERGE,
    ("sglang 0.5.17 cuda",),
)
def vocabulary(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Only tokens beyond the base's vocabulary count: tokenizers copy the base's list."""
    size = (facts.base.number("vocab_size") if facts.base else None) or 0
    for where, adapter in readable_adapters(facts):
        new = [t for t, number in adapter.added_tokens.items() if number >= size]
        if new and facts.base:
            also = "" if facts.engine == "sglang" else ", and the base's tokenizer is served"
            yield refuse(
                f"{where}: adds {len(new)} tokens beyond the base's {size}, which "
                f"{facts.engine} has no rows for{also}",
                MERGE,
            )


@rule(
    "adapter.base",
    "the adapter was trained on this base",
    "adapter_config.json: base_model_name_or_path; reference.json: digests.base",
    "serve the adapter on the base it was trained on, or train it again on this one",
)
def base(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """By the hash of the weights where both are known; Hub ids can be compared, folders have no identity by name."""
    for where, adapter in readable_adapters(facts):
        if adapter.base_hash and facts.base_hash:
            if adapter.base_hash != facts.base_hash:
                yield refuse(
                    f"{where}: was trained on a base with hash {adapter.base_hash[:12]}, but "
                    f"model.source has {facts.base_hash[:12]}",
                    "use the base that the adapter was trained on, or train it again on this one",
                )
            continue
        yield from _named_base(recipe, where, adapter)


def _named_base(recipe: Recipe, where: str, adapter: AdapterFacts) -> Iterator[Finding]:
    source = parse_source(recipe.model.source)
    trained_on = str(adapter.config.get("base_model_name_or_path") or "")
    is_hub_id = trained_on.count("/") == 1 and not trained_on.startswith((".", "/"))
    if source.kind is SourceKind.hub and is_hub_id and trained_on != source.location:
        yield warn(
            f"{where}: was trained on {trained_on!r}, but model.source is {source.location!r}",
            "make sure that both are the same weights",
        )


RULES = (readable, kind, features, rank, slots, architecture, vocabulary, base)
