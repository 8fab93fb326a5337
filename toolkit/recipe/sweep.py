"""``sweep:`` which keys of the recipe are tried with which values, and what is best. No part of any step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from toolkit.recipe.base import Count, Section

TRAIN_METRICS = ("heldout_loss", "final_loss", "tokens_per_second", "peak_gpu_memory_gib")
"""Numbers of the train step that a sweep may look at."""


class RangeSection(Section):
    """Numbers from `low` to `high`, both included; integers where both are."""

    low: int | float
    """Smallest value."""
    high: int | float
    """Largest value."""
    log: bool = False
    """Whether 1e-5 to 1e-4 is as wide as 1e-4 to 1e-3: right for learning rates."""
    points: Annotated[int, Field(ge=2)] | None = None
    """For a grid: how many values, evenly spread."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0, and it is {self.low:g}")
        return self

    @property
    def whole(self) -> bool:
        """Whether its values are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


Choices = Annotated[tuple[Any, ...], Field(min_length=1)]


def _kind(value: Any) -> str:
    return "range" if isinstance(value, Mapping | RangeSection) else "choices"


Values = Annotated[
    Annotated[Choices, Tag("choices")] | Annotated[RangeSection, Tag("range")],
    Discriminator(_kind),
]


class SweepSection(Section):
    """What `toolkit sweep` tries: the recipe with other values, each a run of its own. No step depends on it."""

    over: Annotated[Mapping[str, Values], Field(min_length=1)]
    """Key of the recipe, such as `train.lora.rank`: a list of values, or a range: `{low: 1.0e-5, high: 1.0e-3}`."""
    method: Literal["grid", "random", "optuna"] = "grid"
    """`grid`: every combination. `random`: drawn at random. `optuna`: drawn by what earlier ones measured (TPE)."""
    trials: Count | None = None
    """How many, for `random` and `optuna`."""
    metric: str | None = None
    """One of `evaluate.metrics` (the first unless given), or of the train step, such as `heldout_loss`."""
    of: str | None = None
    """Which evaluated model has the metric: `tuned` where there is one, as in `evaluate.gates`."""
    goal: Literal["maximize", "minimize"] | None = None
    """Which is better; for the toolkit's own metrics it is known."""
    parallel: Count = 2
    """Trials under way at once. Their steps wait for places as other jobs do."""
    seed: int = 0
    """Of `random` and `optuna`."""

    @field_validator("over", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """Keys as ``--set sweep.over.train.lora.rank=[8, 16]`` nests them, dotted again."""
        if not isinstance(value, Mapping):
            return value
        found = dict(_flat(value))
        for key, values in found.items():
            if not isinstance(values, list | tuple | Mapping | RangeSection):
                raise ValueError(
                    f"{key} is {values!r}: write a list of values, or a range {{low: 1, high: 9}}"
                )
        return found

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        for key, values in self.over.items():
            if isinstance(values, RangeSection):
                if self.method == "grid" and values.points is None:
                    raise ValueError(
                        f"over {key} is a range: a grid needs its `points`, or method random or optuna"
                    )
            elif len({json.dumps(one, sort_keys=True) for one in values}) < len(values):
                raise ValueError(f"over {key} has a value twice")
        if self.method != "grid" and self.trials is None:
            raise ValueError(f"method {self.method} needs `trials`: how many")
        if self.method == "grid" and self.trials is not None:
            raise ValueError("trials are for random and optuna: a grid is every combination")
        return self


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        nested = isinstance(inner, Mapping) and not {"low", "high"} & inner.keys()
        if nested and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
