"""Rules on quantized models."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.preflight.architectures import known
from toolkit.preflight.base_facts import BaseFacts
from toolkit.preflight.facts import Facts
from toolkit.preflight.formats import ALTERNATIVE, format_of, loaders, support
from toolkit.preflight.layouts import Layout, broken, layout_of
from toolkit.preflight.verdict import Finding, Outcome, refuse, rule, warn
from toolkit.recipe import Recipe
from toolkit.recipe.quantize import QuantizeSection
from toolkit.recipe.recipe import ON

GROUP_SIZES = (128, 64, 32)
GROUPED = ("gptq", "awq")
SIXTEEN_BITS = ("gptq", "awq", "fp8")
"""Methods of a base beside which vLLM computes in 16 bits only."""
AGAIN = "quantize the full-precision model with a recipe: method gptq or awq"


@rule(
    "quantize.group_size",
    "the group size divides the hidden and the intermediate size",
    "llm-compressor: W4A16 with group 128 raises on hidden size 576; ms-swift#2318 fails at "
    "layer 79 of 80",
    "leave group_size out, or take one that divides",
)
def group_size(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Both sizes are the input width of a linear layer, cut into groups that share a scale."""
    sizes = _sizes(facts.base)
    works = [g for g in GROUP_SIZES if all(value % g == 0 for value in sizes.values())]
    for section in recipe.quantize:
        if section.method not in GROUPED or not sizes:
            continue
        chosen = section.group_size
        shown = " and ".join(f"{key} {value}" for key, value in sizes.items())
        if not works:
            yield refuse(
                f"quantize {section.label}: no group size of 32, 64, 128 divides {shown}",
                "use method int8, fp8 or bnb",
            )
        elif chosen != "auto" and chosen not in works:
            fit = ", ".join(str(g) for g in works)
            yield refuse(
                f"quantize {section.label}: group_size {chosen} does not divide {shown}",
                f"sizes that do: {fit}; or leave group_size out, which takes {works[0]}",
            )


def _sizes(base: BaseFacts | None) -> dict[str, int]:
    if base is None:
        return {}
    found = {key: base.number(key) for key in ("hidden_size", "intermediate_size")}
    return {key: value for key, value in found.items() if value is not None}


@rule(
    "quantize.group_unused",
    "a group size is given only where there are groups",
    "a key that does nothing is a mistake nobody sees",
    "leave group_size out",
)
def group_unused(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """int8 and fp8 have one scale per channel; bitsandbytes has blocks of its own."""
    for section in recipe.quantize:
        if section.method not in GROUPED and section.group_size != "auto":
            yield refuse(
                f"quantize {section.label}: group_size {section.group_size} has no meaning for "
                f"{section.method}",
                "leave group_size out, or use gptq or awq",
            )


@rule(
    "quantize.loads",
    "every quantized model loads in the engine it is meant for",
    "facts of November 2026, one row per engine, accelerator and format",
    "take a method that the engine loads, or an engine that loads the method",
)
def loads(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Served ones must load in the recipe's engine; the others in some locked one."""
    needed = set(recipe.served if recipe.serve else ())
    if recipe.evaluate and recipe.evaluate.needs_engine:
        needed |= set(recipe.evaluated)
    needed = {subject.removeprefix(ON) for subject in needed}
    for section in recipe.quantize:
        if section.label in needed:
            yield from _in_engine(recipe, facts, section)
        else:
            yield from _in_any(section)


def _in_engine(recipe: Recipe, facts: Facts, section: QuantizeSection) -> Iterator[Finding]:
    weights = format_of(section)
    row = support(facts.engine, facts.accelerator, facts.engine_version, weights, facts.capability)
    if (
        row is None or row.outcome is Outcome.ok
    ):  # an engine that is not there at all is serve.engine's to refuse
        return
    message = (
        f"quantize {section.label}: {weights} on {facts.engine_name} ({_place(facts)}): {row.why}"
    )
    others = loaders(weights)
    elsewhere = f"; or serve it where it loads: {', '.join(others)}" if others else ""
    fix = f"{ALTERNATIVE[weights]}{elsewhere}"
    say = refuse if row.outcome is Outcome.refuse else warn
    yield say(message, fix, row.source)


def _in_any(section: QuantizeSection) -> Iterator[Finding]:
    weights = format_of(section)
    if not loaders(weights):
        yield refuse(
            f"quantize {section.label}: no locked engine loads {weights}", ALTERNATIVE[weights]
        )


@rule(
    "quantize.calibration",
    "calibration rows look like the rows that will be served",
    "measured: a W8A8 model with good perplexity answered a chat prompt with garbage",
    "add data.sources",
)
def calibration(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Without a data section only the general text is left to calibrate on."""
    if recipe.data is not None:
        return
    for section in recipe.quantize:
        if section.method in (*GROUPED, "int8"):
            yield warn(
                f"quantize {section.label}: without a data section it is calibrated on general "
                "text only",
                "add data.sources with rows like those you will serve",
            )


@rule(
    "model.loads",
    "a base that is quantized already loads in the engine, in its layout",
    "tables below: formats and layouts",
    "quantize the full-precision model with a recipe",
    ("vllm 0.32.0 cpu", "vllm 0.26.0 cuda"),
)
def base_loads(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Bits, symmetry, group size and order of columns; the GPU's generation; unknown methods."""
    quantization = facts.base.quantization if facts.base else None
    if quantization is None or recipe.serve is None:
        return
    layout = layout_of(quantization)
    if layout.format is None:
        yield from _unknown(facts, layout)
        return
    if facts.engine == "vllm" and layout.method in SIXTEEN_BITS and recipe.serve.dtype == "fp32":
        yield refuse(
            f"model: serve.dtype is fp32, and vLLM serves {layout.method} weights in fp16 and bf16 only",
            "set serve.dtype: bf16",
            "vllm, layers/quantization/auto_gptq.py, auto_awq.py, fp8.py: get_supported_act_dtypes",
        )
    for limit, message in broken(facts.engine, facts.accelerator, facts.engine_version, layout):
        yield (warn if limit.is_slow else refuse)(f"model: {message}", limit.fix, limit.source)
    row = support(
        facts.engine, facts.accelerator, facts.engine_version, layout.format, facts.capability
    )
    if row is not None and row.outcome is not Outcome.ok:
        say = refuse if row.outcome is Outcome.refuse else warn
        yield say(
            f"model: the base is {layout.format}, which {row.engine} does not serve well on "
            f"{_place(facts)}: {row.why}",
            f"{AGAIN}; or {ALTERNATIVE[layout.format]}",
            row.source,
        )


def _unknown(facts: Facts, layout: Layout) -> Iterator[Finding]:
    """A format in no table: the engine may still have it."""
    table = known(facts.engine, facts.engine_version)
    if table is None:
        return
    if layout.method not in table.methods:
        yield refuse(
            f"model: quant_method {layout.method!r} is none that {table.source} has",
            AGAIN,
            f"{table.source}, layers/quantization/__init__.py",
        )
    else:
        yield warn(
            f"model: nothing is known of {layout.method!r} weights in {table.source}",
            f"try it with a short `toolkit serve`, or {AGAIN}",
            f"{table.source}, layers/quantization/__init__.py",
        )


def _place(facts: Facts) -> str:
    """``cpu``, or ``cuda`` with the GPU's capability where it is known."""
    capability = facts.capability
    return facts.accelerator if capability is None else f"{facts.accelerator} {capability:g}"


@rule(
    "model.shared_groups",
    "a quantized layer is cut between GPUs at the border of a group",
    "vllm, kernels/linear/mixed_precision/marlin.py: in_features per partition",
    "lower serve.tensor_parallel, or quantize with smaller groups",
)
def shared_groups(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Layers that are cut along their inputs: o_proj and down_proj."""
    ways = recipe.serve.tensor_parallel if recipe.serve else 1
    quantization = facts.base.quantization if facts.base else None
    if facts.base is None or ways == 1 or quantization is None:
        return
    group = layout_of(quantization).group
    for name in ("o_proj", "down_proj"):
        pair = facts.base.linear(name)
        if group and group > 0 and pair and pair[1] % (ways * group):
            yield refuse(
                f"serve.tensor_parallel is {ways}, but the {pair[1]} inputs of {name} are in "
                f"groups of {group}: a group would lie on two GPUs",
                f"set serve.tensor_parallel: {_ways(pair[1], group)}, or quantize with smaller "
                "groups",
            )
            return


def _ways(inputs: int, group: int) -> int:
    return max(n for n in (1, 2, 4, 8) if inputs % (n * group) == 0)


RULES = (group_size, group_unused, loads, calibration, base_loads, shared_groups)
