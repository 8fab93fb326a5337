"""The whole recipe: one YAML file, one frozen value."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from toolkit.recipe.base import Name, Section
from toolkit.recipe.data import DataSection
from toolkit.recipe.evaluate import EvaluateSection
from toolkit.recipe.export import ExportSection
from toolkit.recipe.model import ModelSection
from toolkit.recipe.objectives import SCORED, TRAINED_ON, Objective
from toolkit.recipe.quantize import QuantizeSection
from toolkit.recipe.serve import ServeSection
from toolkit.recipe.sweep import TRAIN_METRICS, SweepSection
from toolkit.recipe.train import TrainSection
from toolkit.registry import close_match
from toolkit.strict import section_at

NO_STEP = ("name", "description", "tracking", "sweep")
"""Sections that change no step: nothing to sweep over."""

ON = "tuned@"
"""How the name of an adapter on a quantized base begins."""


class TrackingSection(Section):
    """Where MLflow runs go."""

    uri: str | None = None
    """Tracking URI; without it `MLFLOW_TRACKING_URI`, and without that SQLite in the workspace."""
    experiment: str | None = None
    """MLflow experiment; the recipe's name unless given."""


class Recipe(Section):
    """What to do: base model, data, training, export, quantization, evaluation, serving."""

    name: Name
    """Name of the recipe; also the MLflow experiment and the served model unless those are given."""
    description: str = ""
    """One line for `toolkit recipes list`."""
    seed: int = 0
    """Seed of everything random: data order, adapter initialisation, sampling of rows."""
    model: ModelSection
    """The base model, and what is true of it in every stage."""
    data: DataSection | None = None
    """Rows to train on and rows that are held out."""
    train: TrainSection | None = None
    """How the weights are changed; without it nothing is trained."""
    export: ExportSection | None = None
    """Folders that leave training."""
    quantize: tuple[QuantizeSection, ...] = ()
    """Smaller copies of the tuned model, or of the base where nothing is trained."""
    evaluate: EvaluateSection | None = None
    """Metrics on held-out rows, and gates."""
    serve: ServeSection | None = None
    """Which engine serves which models."""
    tracking: TrackingSection = TrackingSection()
    """MLflow store and experiment."""
    sweep: SweepSection | None = None
    """Values that `toolkit sweep` tries."""

    @property
    def subjects(self) -> tuple[str, ...]:
        """Models that this recipe has, in the order they come to be: `base`, `tuned`, `merged`, quantized ones.

        `tuned@NAME` is the trained adapter on the base that the quantization `NAME` made smaller.
        """
        tuned = ("tuned", "merged") if self.train else ()
        adapted = [f"{ON}{q.label}" for q in self.quantize if self._carries_adapter(q)]
        return ("base", *tuned, *(q.label for q in self.quantize), *adapted)

    def _carries_adapter(self, section: QuantizeSection) -> bool:
        return section.of == "base" and self.train is not None and self.train.method != "full"

    @property
    def serves_trained_adapter(self) -> bool:
        """Whether a served model is a base with the trained adapter loaded beside it."""
        return any(s == "tuned" or s.startswith(ON) for s in self.served)

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        if self.train and not self.data:
            raise ValueError("train needs a data section")
        self._formats_fit_the_objective()
        if self.export and not self.train:
            raise ValueError("export needs a train section: there is nothing to export")
        if self.evaluate and not self.data:
            raise ValueError("evaluate needs a data section: held-out rows come from there")
        if self.evaluate and self.evaluate.needs_engine and not self.serve:
            raise ValueError("evaluate goes through an engine, but no serve section names one")
        labels = [q.label for q in self.quantize]
        for label in labels:
            if labels.count(label) > 1 or label in ("base", "tuned", "merged"):
                raise ValueError(
                    f"quantize has two models named {label!r}: give each a name of its own"
                )
        self._names_exist()
        if self.sweep:
            self._sweep_fits(self.sweep)
        return self

    def _sweep_fits(self, sweep: SweepSection) -> None:
        for key in sweep.over:
            parts = tuple(part for part in key.split(".") if not part.isdigit())
            if parts[0] in NO_STEP:
                raise ValueError(f"sweep.over: {key!r} changes no step")
            for depth, part in enumerate(parts):
                section = section_at(type(self), parts[:depth])
                if section and part not in section.model_fields:
                    near = close_match(part, section.model_fields)
                    raise ValueError(f"sweep.over: {key!r} is not a key of a recipe{near}")
        _ = self.swept

    @property
    def swept(self) -> tuple[str, str]:
        """What a sweep looks at: a step, and one of its metrics.

        Raises:
            ValueError: There is no such thing in this recipe.
        """
        metric, of = (self.sweep.metric, self.sweep.of) if self.sweep else (None, None)
        scores = self.evaluate.metrics if self.evaluate else ()
        if of is None and metric in TRAIN_METRICS and self.train:
            return "train", metric
        if not scores:
            if self.train is None or of is not None:
                raise ValueError("sweep needs an evaluate section: there is nothing to compare")
            if metric is not None:
                raise ValueError(
                    f"sweep.metric is {metric!r}, but there is no evaluate section, and the train "
                    f"step has {', '.join(TRAIN_METRICS)}{close_match(metric, TRAIN_METRICS)}"
                )
            return "train", "heldout_loss"
        if metric is not None and metric not in scores:
            near = close_match(metric, (*scores, *TRAIN_METRICS))
            raise ValueError(
                f"sweep.metric is {metric!r}, but evaluate.metrics has {', '.join(scores)}{near}"
            )
        tuned = [name for name in ("tuned", "merged") if name in self.evaluated]
        subject = of or next((name for name in (*tuned, *self.evaluated)), "base")
        if subject not in self.evaluated:
            raise ValueError(
                f"sweep.of names {subject!r}, but evaluated are {', '.join(self.evaluated)}"
            )
        return f"evaluate-{subject}", metric or scores[0]

    @property
    def objective(self) -> Objective:
        """What rows are for: `train.objective`, and `sft` where nothing is trained."""
        return self.train.objective if self.train else "sft"

    def _formats_fit_the_objective(self) -> None:
        data, objective = self.data, self.objective
        if data is None:
            return
        for key, sources, known in (
            ("data.sources", data.sources, TRAINED_ON[objective]),
            ("data.heldout.sources", data.heldout.sources, SCORED[objective]),
        ):
            for source in sources:
                if source.format not in ("auto", *known):
                    raise ValueError(
                        f"{key}: format {source.format!r} is not for train.objective "
                        f"{objective!r}, which reads {', '.join(known)}"
                    )
        grpo = self.train.grpo if self.train else None
        if grpo and grpo.max_completion_tokens >= self.model.max_length:
            raise ValueError(
                f"train.grpo.max_completion_tokens {grpo.max_completion_tokens} leaves no room for "
                f"a question in model.max_length {self.model.max_length}"
            )

    @property
    def served(self) -> tuple[str, ...]:
        """Models to serve, the default filled in."""
        given = self.serve.models if self.serve else ()
        if self.train is None:
            return given or ("base",)
        return given or (("merged",) if self.train.needs_merge else ("tuned",))

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Models to score, the default filled in."""
        given = self.evaluate.of if self.evaluate else ()
        if self.train and self.train.needs_merge:
            return given or tuple(s for s in self.subjects if s != "tuned" and not s.startswith(ON))
        return given or tuple(s for s in self.subjects if s != "merged")

    def _names_exist(self) -> None:
        used = [("evaluate.of", name) for name in self.evaluated]
        used += [("serve.models", name) for name in self.served]
        for gate in self.evaluate.gates if self.evaluate else ():
            used.append(("evaluate.gates: of", gate.of))
            if gate.max_drop is not None:
                used.append(("evaluate.gates: against", gate.against))
        for key, name in used:
            if name not in self.subjects:
                raise ValueError(
                    f"{key} names {name!r}, but this recipe has {', '.join(self.subjects)}"
                )
