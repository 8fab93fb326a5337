"""The whole recipe: one YAML file, one frozen value."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from toolkit.recipe.base import Name, Section
from toolkit.recipe.data import DataSection
from toolkit.recipe.evaluate import EvaluateSection
from toolkit.recipe.export import ExportSection
from toolkit.recipe.model import ModelSection
from toolkit.recipe.quantize import QuantizeSection
from toolkit.recipe.serve import ServeSection
from toolkit.recipe.train import TrainSection

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
        return self

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
