"""The smallest change after which training fits: every combination, the cheapest first. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from toolkit.forecast.parts import GIB, SPARE, Fit, Forecast
from toolkit.forecast.training import Setup, forecast

SHORTEST = 256
"""Tokens; nobody wants less than this as model.max_length."""


@dataclass(frozen=True)
class Change:
    """Keys of the recipe with other values.

    ``cost`` orders changes by what they do: below 4 the result stays what it was and only time is
    paid, 4 to 8 change numerics or ask for more GPUs, beyond 8 another thing is trained.
    """

    settings: tuple[tuple[str, str | int | bool], ...]
    cost: float

    def __str__(self) -> str:
        return ", ".join(f"{key}: {_yaml(value)}" for key, value in self.settings)


def _yaml(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Proposal:
    """Changes after which it fits, and what it then takes."""

    changes: tuple[Change, ...]
    forecast: Forecast

    @property
    def settings(self) -> dict[str, str | int | bool]:
        """Key of the recipe -> value."""
        return dict(pair for change in self.changes for pair in change.settings)

    @property
    def text(self) -> str:
        """As one writes it into the recipe."""
        return ", ".join(map(str, self.changes))


Way = tuple[Setup, tuple[Change, ...]]


def smallest(setup: Setup, gpu_bytes: int, gpus: int = 1) -> Proposal | None:
    """The cheapest combination of changes with which it fits for certain; ``None`` if none does.

    Args:
        setup: What does not fit.
        gpu_bytes: Memory of one GPU.
        gpus: GPUs of the machine; more than ``setup.gpus`` can be used by sharding.
    """
    for way, changes in sorted(_ways(setup, gpus), key=_cost):
        found = forecast(way, gpu_bytes)
        if changes and found.fit is Fit.fits:
            return Proposal(changes, found)
    return None


def least_gpu_gib(setup: Setup) -> int:
    """Memory of the smallest GPU on which it fits unchanged, GiB."""
    return ceil(forecast(setup).total * (1 + SPARE) / GIB)


def _cost(way: Way) -> float:
    return sum(change.cost for change in way[1])


def _ways(setup: Setup, gpus: int) -> Iterator[Way]:
    choices = (
        _recompute(setup),
        _batches(setup),
        _optimizers(setup),
        _shards(setup, gpus),
        _methods(setup),
        _lengths(setup),
    )
    for chosen in product(*choices):
        way, changes = setup, []
        for change, fields in chosen:
            if change:
                changes.append(change)
                way = _applied(way, fields)
        yield way, tuple(changes)


Choice = tuple[Change | None, dict[str, object]]
SAME: Choice = (None, {})


def _applied(setup: Setup, fields: dict[str, object]) -> Setup:
    """``sequences``, ``length`` and ``trained`` belong to the rows, and shrink with what was chosen before."""
    rows = setup.rows
    share = rows.trained / max(1, rows.tokens)
    inner = {name: value for name, value in fields.items() if name in ("sequences", "length")}
    if inner:
        rows = replace(rows, **inner)  # type: ignore[arg-type]
        rows = replace(rows, trained=ceil(rows.tokens * share))
    outer = {name: value for name, value in fields.items() if name not in inner}
    return replace(setup, rows=rows, **outer)  # type: ignore[arg-type]


def _recompute(setup: Setup) -> list[Choice]:
    if setup.keep == "nothing":
        return [SAME]
    change = Change((("train.gradient_checkpointing", True),), 1)
    return [SAME, (change, {"keep": "nothing"})]


def _batches(setup: Setup) -> list[Choice]:
    """Fewer sequences at a time, and as many more times: the same step."""
    found, size, times = [SAME], setup.rows.sequences, setup.accumulation
    whole, steps = size * times, 0
    while size > 1:
        size, steps = size // 2, steps + 1
        times = ceil(whole / size)
        pairs = (("train.batch_size", size), ("train.gradient_accumulation", times))
        change = Change(pairs, 2 + steps / 8)
        found.append((change, {"sequences": size, "accumulation": times}))
    return found


def _optimizers(setup: Setup) -> list[Choice]:
    if setup.optimizer == "adamw_8bit":
        return [SAME]
    return [SAME, (Change((("train.optimizer", "adamw_8bit"),), 4), {"optimizer": "adamw_8bit"})]


def _shards(setup: Setup, gpus: int) -> list[Choice]:
    if gpus < 2 or setup.parallel in ("zero3", "fsdp"):
        return [SAME]
    change = Change((("train.parallel", "fsdp"),), 5)
    return [SAME, (change, {"parallel": "fsdp", "gpus": gpus})]


def _methods(setup: Setup) -> list[Choice]:
    found = [SAME]
    if setup.method == "full":
        fields = {"method": "lora", "targets": tuple(setup.shape.linears), "rank": 16}
        found.append((Change((("train.method", "lora"),), 12), {**fields, "base": "bf16"}))
    if setup.method != "qlora" and setup.width == 2:
        fields = {"method": "qlora", "targets": setup.targets or tuple(setup.shape.linears)}
        rank = setup.rank or 16
        cost = 8 if setup.method == "lora" else 13
        found.append(
            (Change((("train.method", "qlora"),), cost), {**fields, "rank": rank, "base": "nf4"})
        )
    return found


def _lengths(setup: Setup) -> list[Choice]:
    """Shorter rows: those that are longer are dropped or cut, so this is the last resort."""
    found, length, steps = [SAME], setup.rows.length, 0
    while length // 2 >= SHORTEST:
        length, steps = length // 2, steps + 1
        found.append((Change((("model.max_length", length),), 20 * steps), {"length": length}))
    return found
