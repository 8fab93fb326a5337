"""Rules on the tensors of an adapter against the modules of its base: names, shapes, zeros."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from toolkit.engines import BLOCK
from toolkit.preflight.adapter_facts import PREFIX, AdapterFacts, Pair
from toolkit.preflight.adapters import ON_ENGINES, readable_adapters
from toolkit.preflight.architectures import known
from toolkit.preflight.base_facts import TOWERS, BaseFacts
from toolkit.preflight.facts import Facts
from toolkit.preflight.features import MERGE
from toolkit.preflight.verdict import Finding, refuse, rule, warn
from toolkit.recipe import Recipe

TOWER_FLAG = "--enable-tower-connector-lora"

_OTHER_BASE = "use the base that the adapter was trained on"
_AGAIN = "export or train the adapter again"


@rule(
    "adapter.whole",
    "every module of an adapter has lora_A and lora_B, and at least one module is there",
    "vllm, lora/lora_model.py: from_lora_tensors; PEFT: save_pretrained",
    _AGAIN,
    ("vllm 0.32.0 cpu",),
)
def whole(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Half a pair cannot be multiplied; no pair at all changes nothing."""
    for where, adapter in readable_adapters(facts):
        halves = [m for m, pair in adapter.pairs.items() if pair.a is None or pair.b is None]
        if not adapter.pairs:
            yield refuse(f"{where}: adapter_model.safetensors has no lora_A and lora_B", _AGAIN)
        elif halves:
            missing = "lora_A" if adapter.pairs[halves[0]].a is None else "lora_B"
            yield refuse(f"{where}: {halves[0]} has no {missing} ({_count(halves)})", _AGAIN)


@rule(
    "adapter.strangers",
    "an adapter has no tensors but lora_A and lora_B",
    "vllm, lora/utils.py: parse_fine_tuned_lora_name refuses them; sglang drops them in silence",
    MERGE,
    ("vllm 0.32.0 cpu", "vllm 0.26.0 cuda"),
)
def strangers(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Trained biases, magnitude vectors, whole layers: whatever the configuration says of them."""
    for where, adapter in readable_adapters(facts):
        if adapter.strangers:
            does = "drops" if facts.engine == "sglang" else "refuses"
            yield refuse(
                f"{where}: has tensors that are no LoRA pair, such as {adapter.strangers[0]} "
                f"({_count(adapter.strangers, 'tensor')}); {facts.engine} {does} them",
                MERGE,
            )


@rule(
    "adapter.zero",
    "an adapter changes something",
    "vllm#34186, sglang#25913: an adapter that loads and does nothing",
    _AGAIN,
    ON_ENGINES,
)
def zero(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """PEFT starts with lora_B = 0: all zeros means that nothing was trained, or nothing was saved."""
    for where, adapter in readable_adapters(facts):
        if adapter.is_zero:
            yield refuse(
                f"{where}: every lora_B is zero: it answers exactly as the base",
                "train it, or export it again (under DeepSpeed ZeRO-3 weights must be gathered)",
            )


@rule(
    "adapter.names",
    "every module of an adapter is a module of the base",
    "vllm, lora/model_manager.py: activate_adapter skips other names with a DEBUG line; "
    "vllm#22884, vllm#55193",
    "save the adapter with PEFT from the base as Transformers loads it",
    ("vllm 0.32.0 cpu", "vllm 0.26.0 cuda", "sglang 0.5.17 cuda"),
)
def names(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """A wrong prefix loads without an error, and the base answers."""
    if facts.base is None:
        return
    for where, adapter in readable_adapters(facts):
        lost = [m for m in adapter.pairs if not _belongs(facts.base, m.replace(PREFIX, ""))]
        if lost:
            yield from _lost(where, adapter, facts, lost)


def _belongs(base: BaseFacts, module: str) -> bool:
    """By the base's own tensors where they are here; else by its number of layers alone."""
    if base.is_multimodal or any(part in module for part in (".experts", *TOWERS)):
        return True  # engines rename these, each in its own way
    if base.modules:
        return module in base.modules
    layers, parts = base.number("num_hidden_layers"), module.split(".")
    number = next((int(p) for p in parts if p.isdigit()), None)
    return layers is None or number is None or number < layers


def _lost(where: str, adapter: AdapterFacts, facts: Facts, lost: list[str]) -> Iterator[Finding]:
    base = facts.base
    layers = base.number("num_hidden_layers") if base else None
    if layers is not None and adapter.layers and max(adapter.layers) >= layers:
        yield refuse(
            f"{where}: has layer {max(adapter.layers)}, but the base has {layers} layers",
            _OTHER_BASE,
        )
        return
    near = _nearest(lost[0], base)
    if near and facts.engine == "sglang":
        yield warn(
            f"{where}: {lost[0]} is no module of the base ({_count(lost)}); sglang goes by the "
            "number of the layer and the end of the name",
            f"save the adapter with PEFT: the base calls it {near}",
            "sglang, lora/lora.py: get_layer_id",
        )
        return
    everything = len(lost) == len(adapter.pairs)
    answer = "it would answer as the base" if everything else "that part would be missing"
    yield refuse(
        f"{where}: {lost[0]} is no module of the base ({len(lost)} of {len(adapter.pairs)}); "
        f"{answer}",
        f"the base calls it {near}: save the adapter with PEFT from the base as Transformers "
        "loads it"
        if near
        else _OTHER_BASE,
    )


def _nearest(module: str, base: BaseFacts | None) -> str | None:
    """A module of the base with the same end: ``layers.0.self_attn.q_proj``."""
    tail = ".".join(module.split(".")[-4:])
    return next((m for m in (base.modules if base else ()) if m.endswith(tail)), None)


@rule(
    "adapter.shape",
    "the tensors of an adapter fit the layers of the base",
    "vllm, lora/layers/base_linear.py: set_lora copies smaller tensors into a corner without a "
    "word; sglang, lora/mem_pool.py asserts at the first request",
    _OTHER_BASE,
    ("vllm 0.32.0 cpu", "vllm 0.26.0 cuda"),
)
def shape(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Both sides of q, k, v, o, gate, up and down: grouped-query attention has smaller k and v."""
    if facts.base is None:
        return
    for where, adapter in readable_adapters(facts):
        for module, pair in adapter.pairs.items():
            if found := _misfit(facts.base, module, pair):
                yield refuse(f"{where}: {found}", _OTHER_BASE)
                break


def _misfit(base: BaseFacts, module: str, pair: Pair) -> str | None:
    expected = _expected(base, module)
    if expected is None or pair.a is None or pair.b is None:
        return None
    outputs, inputs = expected
    a, b = (outputs, inputs) if pair.is_embedding else (inputs, outputs)
    if pair.a[-1] == a and pair.b[0] == b:
        return None
    hidden = base.number("hidden_size")
    if not pair.is_embedding and inputs == hidden and pair.a[-1] != a:
        return f"was trained on hidden size {pair.a[-1]}, but the base has {hidden} ({module})"
    return (
        f"{module} was trained with {pair.a[-1]} inputs and {pair.b[0]} outputs, but the base has "
        f"{a} and {b}"
    )


def _expected(base: BaseFacts, module: str) -> tuple[int, int] | None:
    """(outputs, inputs) by the base's own tensors, or else by its config."""
    own = base.modules.get(module)
    if own is not None and len(own) == 2:
        return own[0], own[1]
    name = module.rpartition(".")[2]
    is_text = not (base.is_multimodal or any(tower in module for tower in TOWERS))
    return base.linear(name) if is_text and name in (*BLOCK, "lm_head", "embed_tokens") else None


@rule(
    "adapter.tensor_rank",
    "the tensors of an adapter have the rank that its configuration gives",
    "vllm, lora/lora_weights.py: the scale is alpha / r of the configuration",
    _AGAIN,
)
def tensor_rank(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """A configuration of another adapter scales this one wrong."""
    for where, adapter in readable_adapters(facts):
        for module, pair in adapter.pairs.items():
            wanted = adapter.rank_of(module)
            if pair.a and pair.rank != wanted and wanted > 0 and "experts" not in module:
                yield refuse(
                    f"{where}: {module} has rank {pair.rank}, but adapter_config.json says "
                    f"{wanted}",
                    "put adapter_config.json and adapter_model.safetensors of one training "
                    "together",
                )
                break


@rule(
    "adapter.depth",
    "an adapter reaches all layers of the base, unless it says otherwise",
    "PEFT: layers_to_transform; an adapter of a shallower model of the same width loads",
    _OTHER_BASE,
)
def depth(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """A model cut from a deeper one has the same shapes."""
    layers = facts.base.number("num_hidden_layers") if facts.base else None
    for where, adapter in readable_adapters(facts):
        chosen = adapter.config.get("layers_to_transform") is not None
        if layers is None or chosen or not adapter.layers or max(adapter.layers) >= layers:
            continue
        if max(adapter.layers) + 1 < layers:
            yield warn(
                f"{where}: ends at layer {max(adapter.layers)}, and the base has {layers} layers",
                "make sure that it was trained on this base",
            )


@rule(
    "adapter.tower",
    "an adapter is on the language model, or the engine is told to serve the rest",
    "vllm, lora/model_manager.py: _maybe_init_mm ignores towers unless told; sglang matches "
    "layer numbers and loads a tower's tensors into the language model; vllm#23796",
    "train the language model only (exclude_modules in PEFT), or " + MERGE,
)
def tower(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Vision and audio encoders, and the projector behind them."""
    for where, adapter in readable_adapters(facts):
        found = [m for m in adapter.pairs if any(name in m for name in TOWERS)]
        if not found:
            continue
        does = f"{where}: is on {found[0]} ({_count(found)}), which {facts.engine_name}"
        table = known(facts.engine, facts.engine_version)
        able = table is not None and facts.base and facts.base.architecture in table.tower
        told = recipe.serve is not None and TOWER_FLAG in recipe.serve.extra_args
        if facts.engine == "sglang":
            yield refuse(f"{does} would load into the language model", MERGE)
        elif not able:
            yield refuse(f"{does} does not serve", MERGE)
        elif not told:
            yield refuse(
                f"{does} ignores unless told",
                f"add {TOWER_FLAG} to serve.extra_args, or {MERGE}",
            )


def _count(found: Sequence[str], what: str = "module") -> str:
    return f"{len(found)} {what}{'' if len(found) == 1 else 's'}"


RULES = (whole, strangers, zero, names, shape, tensor_rank, depth, tower)
