"""Rules on quantized models."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.preflight.facts import BaseFacts, Facts
from toolkit.preflight.formats import ALTERNATIVE, format_of, format_of_base, loaders, support
from toolkit.preflight.verdict import Finding, Outcome, refuse, rule, warn
from toolkit.recipe import Recipe
from toolkit.recipe.quantize import QuantizeSection

GROUP_SIZES = (128, 64, 32)
GROUPED = ("gptq", "awq")


@rule(
    "quantize.group_size",
    "the group size divides the hidden and the intermediate size",
    "llm-compressor: W4A16 with group 128 raises on hidden size 576; ms-swift#2318 fails at "
    "layer 79 of 80",
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
)
def loads(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Served ones must load in the recipe's engine; the others in some locked one."""
    needed = set(recipe.served if recipe.serve else ())
    if recipe.evaluate and recipe.evaluate.needs_engine:
        needed |= set(recipe.evaluated)
    for section in recipe.quantize:
        if section.label in needed:
            yield from _in_engine(recipe, facts, section)
        else:
            yield from _in_any(section)


def _in_engine(recipe: Recipe, facts: Facts, section: QuantizeSection) -> Iterator[Finding]:
    engine = recipe.serve.engine if recipe.serve else "vllm"
    weights = format_of(section)
    row = support(engine, facts.accelerator, facts.engine_version, weights)
    if (
        row is None or row.outcome is Outcome.ok
    ):  # an engine that is not there at all is serve.engine's to refuse
        return
    version = ".".join(map(str, facts.engine_version))
    message = (
        f"quantize {section.label}: {weights} on {engine} {version} "
        f"({facts.accelerator}): {row.why}"
    )
    others = loaders(weights)
    elsewhere = f"; or serve it where it loads: {', '.join(others)}" if others else ""
    fix = f"{ALTERNATIVE[weights]}{elsewhere}"
    yield refuse(message, fix) if row.outcome is Outcome.refuse else warn(message, fix)


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
    "a base that is quantized already loads in the engine",
    "vllm: layers/quantization/auto_gptq.py, gptq_utils.py",
)
def base_loads(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Other tools write GPTQ that is asymmetric, of 3 bits, or with ``desc_act`` in groups."""
    quantization = facts.base.quantization if facts.base else None
    if quantization is None or recipe.serve is None:
        return
    fix = "quantize the full-precision model with a recipe: method gptq or awq"
    if quantization.get("quant_method") == "gptq":
        yield from _gptq_layout(quantization, fix)
    weights = format_of_base(quantization)
    row = (
        support(recipe.serve.engine, facts.accelerator, facts.engine_version, weights)
        if weights
        else None
    )
    if row is not None and row.outcome is not Outcome.ok:
        say = refuse if row.outcome is Outcome.refuse else warn
        yield say(
            f"model: the base is {weights}, which {row.engine} does not serve well on "
            f"{facts.accelerator}: {row.why}",
            fix,
        )


def _gptq_layout(quantization: object, fix: str) -> Iterator[Finding]:
    values = quantization if isinstance(quantization, dict) else {}
    bits, symmetric = values.get("bits"), values.get("sym", True)
    if bits not in (4, 8) or not symmetric:
        yield refuse(
            f"model: GPTQ weights with bits {bits}, sym {symmetric}; engines load 4 or 8 bits, "
            "symmetric",
            fix,
        )
    if values.get("desc_act") and values.get("group_size", -1) != -1:
        yield refuse(
            f"model: GPTQ weights with desc_act and group_size {values['group_size']}: vLLM no "
            "longer loads them",
            fix,
        )


RULES = (group_size, group_unused, loads, calibration, base_loads)
