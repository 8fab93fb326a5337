"""How much GPU memory the steps of a recipe take, and rules on it. The formulas are in ``toolkit/forecast``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from toolkit.forecast import quantizing, training
from toolkit.forecast.block import Keep, Rows
from toolkit.forecast.changes import Proposal, least_gpu_gib, smallest
from toolkit.forecast.parts import Fit, Forecast, gib, summed
from toolkit.forecast.shape import ModelShape
from toolkit.preflight import capacity
from toolkit.preflight.base_facts import shape_of
from toolkit.preflight.facts import Facts
from toolkit.preflight.verdict import Finding, refuse, rule, warn
from toolkit.recipe import Recipe
from toolkit.recipe.train import TrainSection
from toolkit.train.speed.choose import Choice, Machine, choose

BF16_FROM = 8.0
"""Compute capability from which a GPU has bf16."""

UNEVEN = 1.25
"""How much denser in trained tokens the worst packed batch is taken to be than the average one."""


@dataclass(frozen=True)
class StepMemory:
    """The forecast of one step."""

    step: str
    forecast: Forecast
    fit: Fit
    proposal: Proposal | None = None
    """The smallest change with which it fits, where it does not or may not."""
    notes: tuple[str, ...] = ()
    """What was assumed because nobody knows it yet."""

    def as_json(self) -> dict[str, Any]:
        """For ``--json``: whole bytes."""
        proposal = self.proposal
        return {
            "step": self.step,
            "parts_bytes": {part.name: part.bytes for part in self.forecast.parts},
            "total_bytes": self.forecast.total,
            "gpu_bytes": self.forecast.gpu_bytes,
            "verdict": str(self.fit),
            "notes": list(self.notes),
            "change": proposal
            and {
                "set": proposal.settings,
                "total_bytes": proposal.forecast.total,
            },
        }


def forecasts(recipe: Recipe, facts: Facts) -> tuple[StepMemory, ...]:
    """Of every step that puts a model on the GPU; empty without one, and where the base is unknown."""
    shape = shape_of(facts.base) if facts.base else None
    if shape is None or facts.accelerator != "cuda":
        return ()
    found = [
        *_training(recipe, facts, shape),
        *_quantizing(recipe, facts, shape),
        *_serving(recipe, facts),
    ]
    return tuple(found)


def no_forecast(recipe: Recipe, facts: Facts) -> str | None:
    """Why nothing is said of memory though a model goes onto a GPU; ``None`` where something is."""
    if facts.accelerator != "cuda" or not (recipe.train or recipe.quantize or recipe.serve):
        return None
    if facts.base is None:
        return (
            "no forecast of memory yet: the base is not fetched. Plan shows it once fetch is done, and "
            "supervised training looks before it loads the model"
        )
    if shape_of(facts.base) is None:
        named = facts.base.architecture or "the base"
        return f"no forecast of memory: {named} is not a dense decoder"
    return None


def _gpu_bytes(facts: Facts) -> int | None:
    return facts.gpu.memory_bytes if facts.gpu else None


def _training(recipe: Recipe, facts: Facts, shape: ModelShape) -> Iterator[StepMemory]:
    if recipe.train is None:
        return
    setup, notes = training_setup(recipe, recipe.train, facts, shape)
    gpu = _gpu_bytes(facts)
    if recipe.train.gradient_checkpointing == "auto":
        setup = training.roomiest(setup, gpu)
    found = training.forecast(setup, gpu)
    fit, proposal = found.fit, None
    if fit is Fit.too_large and not facts.dataset:  # rows that nobody knows may have few targets
        kind = replace(setup, rows=replace(setup.rows, trained=1))
        fit = fit if training.forecast(kind, gpu).fit is fit else Fit.tight
    if gpu and fit is not Fit.fits:
        proposal = smallest(setup, gpu, facts.gpu.count if facts.gpu else 1)
    yield StepMemory("train", found, fit, proposal, notes)


def training_setup(
    recipe: Recipe, train: TrainSection, facts: Facts, shape: ModelShape
) -> tuple[training.Setup, tuple[str, ...]]:
    """What decides the memory of the train step, and what was assumed."""
    rows, notes = _worst_rows(recipe, train, facts)
    if not shape.known:
        notes = (
            *notes,
            f"{(facts.base and facts.base.family) or 'this kind'} is taken to be like Llama",
        )
    old = (facts.capability or BF16_FROM) < BF16_FROM
    width = 4 if train.precision == "fp32" or (train.precision == "auto" and old) else 2
    config = facts.base.config if facts.base else None
    machine = Machine("cuda", facts.capability, facts.ranks)
    return setup_of(
        train, shape, rows, width, choose(train, config, machine), gpus=facts.ranks
    ), notes


def setup_of(
    train: TrainSection,
    shape: ModelShape,
    rows: Rows,
    width: int,
    speed: Choice,
    *,
    gpus: int = 1,
) -> training.Setup:
    """What decides the memory of a training section on a GPU.

    Args:
        train: The section.
        shape: Of the model.
        rows: The largest micro-batch.
        width: 2 in bf16 and 4 in fp32.
        speed: What ``train.speed`` came to; blocks of the fast path keep the least there is, as
            ``roomiest`` may change.
        gpus: How many train together.
    """
    base: training.Base = "bf16" if width == 2 else "fp32"
    if train.method == "lora" and train.base_precision == "fp8":
        base = "fp8_once"
    if speed.packs:
        rows = replace(rows, apart=False)  # by cumulative lengths: no mask
    lora = train.lora
    return training.Setup(
        shape,
        train.method,
        "nf4" if train.method == "qlora" else base,
        width,
        rows,
        tuple(shape.linears) if lora.targets == "all-linear" else lora.targets,
        lora.rank,
        _keep(train, fused=speed.fast),
        fused=speed.fast,
        optimizer=train.optimizer,
        accumulation=train.gradient_accumulation,
        dropout=lora.dropout > 0,
        gpus=gpus,
        parallel="ddp" if train.parallel == "auto" else train.parallel,
    )


def _keep(train: TrainSection, *, fused: bool) -> Keep:
    if train.gradient_checkpointing is False:
        return "products" if fused else "everything"
    return "nothing"


def _worst_rows(recipe: Recipe, train: TrainSection, facts: Facts) -> tuple[Rows, tuple[str, ...]]:
    """The largest micro-batch there can be: full sequences, as far as the rows are known."""
    length, made = recipe.model.max_length, facts.dataset
    notes: list[str] = []
    packing = train.packing and train.objective == "sft"
    pairs = 2 if train.objective in ("dpo", "orpo") else 1
    sequences, share = train.batch_size, 1.0
    if made:
        sequences = min(sequences, int(made["rows"]))
        longest = min(length, int(made["longest_row"]))
        length = length if packing else longest
        if packing:
            share = min(1.0, UNEVEN * made["trained_tokens"] / max(1, made["tokens"]))
    else:
        notes = ["rows are not made yet: taken to be model.max_length long and trained throughout"]
    if train.objective != "sft":
        notes.append(f"{train.objective} is taken for supervised training on as many sequences")
    sequences *= pairs
    trained = ceil(sequences * length * share)
    return Rows(sequences, length, trained, packing), tuple(notes)


def _quantizing(recipe: Recipe, facts: Facts, shape: ModelShape) -> Iterator[StepMemory]:
    for section in recipe.quantize:
        bits = section.bits or (4 if section.method in ("gptq", "awq", "bnb") else 8)
        length = min(recipe.model.max_length, int(facts.dataset.get("longest_row", 2**31)))
        setup = quantizing.QuantizeSetup(shape, section.method, bits, length)
        found = quantizing.forecast(setup, _gpu_bytes(facts))
        yield StepMemory(f"quantize-{section.label}", found, found.fit)


def _serving(recipe: Recipe, facts: Facts) -> Iterator[StepMemory]:
    for subject in recipe.served if recipe.serve else ():
        found = capacity.served(recipe, facts, subject)
        if found is not None:
            yield StepMemory(f"serve-{subject}", *found)


@rule(
    "train.memory",
    "training fits into the GPU",
    "forecast/training.py has the formulas, docs/explanation/memory-forecast.md what was measured",
    "a smaller batch, recomputing, 8-bit optimizer states, qlora, or more GPUs",
)
def train_memory(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Refuses what no error of the forecast could make fit."""
    if recipe.train is None or "train" in facts.done:
        return
    for one in forecasts(recipe, facts):
        if one.step == "train" and one.fit in (Fit.too_large, Fit.tight):
            yield _finding(one, recipe, facts)


@rule(
    "quantize.memory",
    "quantizing fits into the GPU",
    "stages/quantize.py measures the whole model before and after; forecast/quantizing.py",
    "a lower model.max_length or a larger GPU",
)
def quantize_memory(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """The whole model is on the GPU while it is measured, whatever the method."""
    for one in forecasts(recipe, facts):
        due = one.step.startswith("quantize-") and one.step not in facts.done
        if due and one.fit in (Fit.too_large, Fit.tight):
            yield _finding(one, recipe, facts)


def _finding(one: StepMemory, recipe: Recipe, facts: Facts) -> Finding:
    verb = "does not fit" if one.fit is Fit.too_large else "is tight"
    message = (
        f"{one.step} {verb}: {summed(one.forecast.parts)} of {gib(one.forecast.limit or 0)} GiB"
    )
    hint = _hint(one, recipe, facts)
    if one.fit is Fit.too_large:
        return refuse(message, hint)
    probe = "; toolkit train --probe tells for certain" if one.step == "train" else ""
    return warn(message, hint + probe)


def _hint(one: StepMemory, recipe: Recipe, facts: Facts) -> str:
    if one.proposal is not None:
        return f"set {one.proposal.text} ({gib(one.proposal.forecast.total)} GiB)"
    shape = shape_of(facts.base) if facts.base else None
    if one.step == "train" and recipe.train and shape:
        least = least_gpu_gib(training_setup(recipe, recipe.train, facts, shape)[0])
        return f"take a GPU with at least {least} GiB: no setting makes it fit a smaller one"
    return f"take a GPU with at least {ceil(one.forecast.total * 1.05 / 2**30)} GiB"


RULES = (train_memory, quantize_memory)
