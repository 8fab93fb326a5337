"""``evaluate:`` how good a model is on held-out rows, and how good it must be."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from toolkit.recipe.base import Count, Section
from toolkit.recipe.paths import file_of

BUILTIN_METRICS = ("exact_match", "json_match", "contains", "token_f1", "perplexity")


class GateSection(Section):
    """A bound that a model must keep; the run exits with 1 when it does not."""

    of: str
    """Which model: `base`, `tuned`, `merged`, or the name of a quantized one."""
    metric: str
    """One of `evaluate.metrics`."""
    min: float | None = None
    """The metric must be at least this."""
    max: float | None = None
    """The metric must be at most this."""
    max_drop: float | None = None
    """The metric may be at most this much worse than that of `against`, in the metric's own unit."""
    against: str = "tuned"
    """The model that `max_drop` compares with."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if self.min is None and self.max is None and self.max_drop is None:
            raise ValueError("a gate needs min, max or max_drop")
        return self


class LmEvalSection(Section):
    """Tasks of lm-evaluation-harness, run against the served endpoint."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names that `lm_eval --tasks list` shows."""
    limit: Count | None = None
    """Score only the first rows of each task."""


class EvaluateSection(Section):
    """Metrics over held-out rows for every model of the recipe."""

    of: tuple[str, ...] = ()
    """Models to score: `base`, `tuned`, `merged`, names of quantized ones. Empty: all but `merged`."""
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] = ("exact_match",)
    """`exact_match`, `json_match`, `contains`, `token_f1`, `perplexity`, or `file.py:function` of yours."""
    max_rows: Count = 200
    """Score at most this many held-out rows."""
    max_new_tokens: Count = 128
    """Longest answer in tokens."""
    batch_size: Count = 16
    """Rows that are answered together."""
    through: Literal["transformers", "engine"] = "transformers"
    """Generate with Transformers, or through the engine that serves."""
    gates: tuple[GateSection, ...] = ()
    """Bounds that must hold, or the run exits with 1."""
    lm_eval: LmEvalSection | None = None
    """Public benchmarks, through the engine."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the user's own metrics, as the recipe writes them."""
        return tuple(file_of(metric) for metric in self.metrics if ".py:" in metric)

    @property
    def needs_engine(self) -> bool:
        """Whether any of the scores goes through the engine that serves."""
        return self.through == "engine" or self.lm_eval is not None

    @model_validator(mode="after")
    def _metrics_exist(self) -> Self:
        for metric in self.metrics:
            if metric not in BUILTIN_METRICS and ".py:" not in metric:
                raise ValueError(
                    f"metric {metric!r} is unknown; use {', '.join(BUILTIN_METRICS)} or 'file.py:function'"
                )
        return self
