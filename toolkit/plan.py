"""A recipe becomes a plan: steps, each with a fingerprint of all that decides its bytes. Pure: no I/O in here.

``observe.py`` looks at the machine before; ``survey.py`` compares a plan with the artifacts that
are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit import digests
from toolkit.errors import UsageError
from toolkit.proof.choice import rivals
from toolkit.recipe.load import Loaded
from toolkit.recipe.model import SourceKind, parse_source
from toolkit.recipe.recipe import ON, Recipe
from toolkit.recipe.serve import ServeSection
from toolkit.stages import CONFIGS, STAGES, Kind

UNIDENTIFIED: Mapping[str, tuple[str, ...]] = {
    "train": ("train.checkpoint_every", "train.on_oom", "train.parallel"),
    "evaluate": ("engine.host", "engine.port", "engine.start_timeout_s"),
    "serve": (
        *("serve.host", "serve.port", "serve.start_timeout_s"),
        *("serve.front", "serve.replicas", "serve.engines", "serve.drain_s", "serve.log_requests"),
        *("serve.watch_s", "serve.prefer"),
    ),
}
"""Config keys by stage that a stage is told but that change nothing it makes: no part of a fingerprint."""


@dataclass(frozen=True)
class Observed:
    """What planning needs to know of the machine.

    Attributes:
        files: sha256 of local files and folders, by the path that the recipe gives.
        source: What ``model.source`` names now, where that moves (an MLflow alias): its version.
        unproven: Adapter folders of the recipe, by path, whose ``reference.json`` is to be made here: they bring none.
        environments: Digest of the lock (or interpreter) of each logical environment.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    environments: Mapping[str, str] = field(default_factory=dict)
    source: str | None = None
    unproven: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Step:
    """One process to run: a stage with its config and inputs."""

    name: str
    stage: str
    kind: Kind
    config: Mapping[str, Any]
    """What the stage is told; ``identity["config"]`` is the same without the keys of UNIDENTIFIED."""
    inputs: Mapping[str, str]
    """Role -> name of the step that makes it."""
    environments: tuple[str, ...]
    """Logical environments; the stage's own first."""
    fingerprint: str
    identity: Mapping[str, Any]
    """What the fingerprint is the digest of."""


@dataclass(frozen=True)
class Plan:
    """Steps in an order in which each stands after its inputs."""

    recipe: Recipe
    path: Path
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)

    def upto(self, stages: Sequence[str] = (), names: Sequence[str] = ()) -> Plan:
        """The plan cut to the steps of some stages (or of some names) and all they need.

        Raises:
            UsageError: The recipe has no such step.
        """
        targets = [s.name for s in self.steps if s.stage in stages or s.name in names]
        if not targets:
            wanted = " or ".join((*stages, *names))
            raise UsageError(
                f"{self.path} has no step for {wanted}; its steps are {', '.join(s.name for s in self.steps)}",
                f"add a section `{stages[0]}:` to the recipe" if stages else None,
            )
        needed: set[str] = set()
        for step in reversed(self.steps):
            if step.name in targets or step.name in needed:
                needed |= {step.name, *step.inputs.values()}
        return replace(self, steps=tuple(s for s in self.steps if s.name in needed))


def make_plan(loaded: Loaded, observed: Observed) -> Plan:
    """Turn a recipe into steps."""
    return Plan(loaded.recipe, loaded.path, tuple(_Planner(loaded.recipe, observed).steps()))


class _Planner:
    """Builds the steps of one recipe in order; ``made`` holds those that exist so far."""

    def __init__(self, recipe: Recipe, observed: Observed) -> None:
        self.recipe = recipe
        self.observed = observed
        self.made: dict[str, Step] = {}

    def steps(self) -> Iterator[Step]:
        recipe = self.recipe
        self._fetch()
        if recipe.data:
            self._data()
        if recipe.evaluate and "base" in recipe.evaluated:
            self._evaluate("base")
        if recipe.train:
            self._train()
        for section in recipe.quantize:
            self._quantize(section)
        if recipe.evaluate:
            for subject in recipe.evaluated:
                if subject != "base":
                    self._evaluate(subject)
        if recipe.serve:
            for subject in recipe.served:
                self._serve(subject)
            self._choose()
        return iter(_natural_order(self.made))

    def _fetch(self) -> None:
        model = self.recipe.model
        paths = [model.chat_template] if model.chat_template else []
        if parse_source(model.source).kind in (SourceKind.folder, SourceKind.gguf):
            paths.append(model.source)
        config = model.model_dump(mode="json", exclude={"max_length"})
        config |= {
            "source": self.observed.source or model.source,
            "digests": self._digests(*paths),
        }
        self._add("fetch", "fetch", config)

    def _data(self) -> None:
        data = self.recipe.data
        if data is None:
            return
        named = [s.file for s in (*data.sources, *data.heldout.sources) if s.file]
        grpo = self.recipe.train.grpo if self.recipe.train else None
        config = {
            "data": data.model_dump(mode="json"),
            "digests": self._digests(*named),
            "objective": self.recipe.objective,
            "answer_tokens": grpo.max_completion_tokens if grpo else 0,
        }
        self._add("data", "data", config | self._shared, {"model": "fetch"})

    def _train(self) -> None:
        recipe = self.recipe
        if recipe.train is None:
            return
        full = recipe.train.method == "full"
        rewards = recipe.train.grpo.files if recipe.train.grpo else ()
        config = {
            "train": recipe.train.model_dump(mode="json"),
            "digests": self._digests(*rewards),
        } | self._shared
        kind = Kind.model if full else Kind.adapter
        self._add("train", "train", config, {"model": "fetch", "dataset": "data"}, kind=kind)
        for format_ in ("merged",) if full else ("adapter", "merged"):
            if format_ in self._formats_needed():
                self._export(format_, recipe.train.method)

    def _export(self, format_: str, method: str) -> None:
        recipe = self.recipe
        model = recipe.model
        config = {
            "format": format_,
            "dtype": recipe.export.dtype if recipe.export else "bf16",
            "method": method,
            "card": {"recipe": recipe.name, "base": model.source, "revision": model.revision},
        }
        kind = Kind.adapter if format_ == "adapter" else Kind.model
        inputs = {"model": "fetch", "adapter": "train", "dataset": "data"}
        self._add(f"export-{format_}", "export", config, inputs, kind=kind)

    def _formats_needed(self) -> set[str]:
        """Formats that the recipe exports by name, and those that later steps read."""
        named = set(self.recipe.export.formats) if self.recipe.export else set()
        used = {*self.recipe.evaluated} if self.recipe.evaluate else set()
        used |= {*self.recipe.served} if self.recipe.serve else set()
        merges = any(q.of == "merged" for q in self.recipe.quantize) or "merged" in used
        adapts = any(subject == "tuned" or subject.startswith(ON) for subject in used)
        return named | ({"merged"} if merges else set()) | ({"adapter"} if adapts else set())

    def _quantize(self, section: Any) -> None:
        model = "export-merged" if self.recipe.train and section.of == "merged" else "fetch"
        config = {"quantize": section.model_dump(mode="json", exclude={"name"})} | self._shared
        dataset = {"dataset": "data"} if self.recipe.data else {}
        self._add(f"quantize-{section.label}", "quantize", config, {"model": model} | dataset)

    def _evaluate(self, subject: str) -> None:
        section = self.recipe.evaluate
        if section is None:
            return
        config = section.model_dump(mode="json", exclude={"of", "gates"})
        engine = self.recipe.serve if section.needs_engine else None
        config |= {
            "subject": subject,
            "max_length": self.recipe.model.max_length,
            "digests": self._digests(*section.files, *_draft(engine)),
            "engine": engine.model_dump(mode="json", exclude=_NOT_SCORED) if engine else None,
        }
        engines = (engine.engine,) if engine else ()
        self._add(
            f"evaluate-{subject}",
            "evaluate",
            config,
            {"dataset": "data"} | self._weights(subject),
            engines=engines,
        )

    def _serve(self, subject: str) -> None:
        serve = self.recipe.serve
        if serve is None:
            return
        section = serve.model_dump(mode="json", exclude={"models", "name"})
        adapters = (path for a in serve.adapters for path in a.folders.values())
        paths = (*adapters, *_draft(serve))
        config = {
            "subject": subject,
            "name": serve.name or self.recipe.name,
            "serve": section,
            "max_length": self.recipe.model.max_length,
            "system": self.recipe.data.system if self.recipe.data else None,
            "digests": self._digests(*paths),
        }
        dataset = {"dataset": "data"} if self.recipe.data else {}
        self._add(
            f"serve-{subject}",
            "serve",
            config,
            dataset | self._weights(subject) | self._references(subject),
            engines=(serve.engine,),
        )

    def _references(self, subject: str) -> dict[str, str]:
        """Steps that make the training side's word on adapters from elsewhere, by role: ``adapter NAME``."""
        serve = self.recipe.serve
        base = self._complete(self._weights(subject)["model"])
        dataset = {"dataset": "data"} if self.recipe.data else {}
        made = {}
        for name, path in (
            ((n, p) for a in serve.adapters for n, p in a.folders.items()) if serve else ()
        ):
            if path not in self.observed.unproven:
                continue
            step = f"reference-{name.replace(' ', '@')}" + ("" if base == "fetch" else "-merged")
            config = {"name": name, "path": path, "digests": self._digests(path)}
            self._add(step, "reference", config, {"model": base} | dataset)
            made[f"adapter {name}"] = step
        return made

    def _complete(self, model: str) -> str:
        """The step of the weights that a quantized model was made from; other models are complete."""
        return self.made[model].inputs["model"] if self.made[model].stage == "quantize" else model

    def _choose(self) -> None:
        """Where two ways to serve the tuned model are rivals, say which is nearer to it."""
        found = rivals(self.recipe)
        if found is None:
            return
        config = {"subjects": found.subjects, "prefer": found.prefer, "metric": found.metric}
        names = (f"{stage}-{s}" for s in found.subjects for stage in ("serve", "evaluate"))
        self._add("choose", "choose", config, {name: name for name in names if name in self.made})

    def _weights(self, subject: str) -> dict[str, str]:
        """The inputs that together are one model of the recipe."""
        full = self.recipe.train is not None and self.recipe.train.method == "full"
        if subject == "base":
            return {"model": "fetch"}
        if subject == "tuned":
            return (
                {"model": "export-merged"}
                if full
                else {"model": "fetch", "adapter": "export-adapter"}
            )
        if subject.startswith(ON):
            model = f"quantize-{subject.removeprefix(ON)}"
            return {"model": model, "adapter": "export-adapter"}
        return {"model": "export-merged" if subject == "merged" else f"quantize-{subject}"}

    @property
    def _shared(self) -> dict[str, Any]:
        return {"max_length": self.recipe.model.max_length, "seed": self.recipe.seed}

    def _digests(self, *paths: str) -> dict[str, str]:
        return {path: self.observed.files[path] for path in paths}

    def _add(
        self,
        name: str,
        stage: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str] | None = None,
        *,
        engines: tuple[str, ...] = (),
        kind: Kind | None = None,
    ) -> None:
        inputs = inputs or {}
        verb = STAGES[stage]
        resolved = CONFIGS[stage].model_validate(config).model_dump(mode="json")
        environments = (verb.environment, *engines)
        identity = {
            "stage": stage,
            "revision": verb.revision,
            "config": _identifying(stage, resolved),
            "inputs": {
                role: self.made[source].fingerprint for role, source in sorted(inputs.items())
            },
            "environments": {
                e: self.observed.environments.get(e) for e in environments if e != "core"
            },
        }
        self.made[name] = Step(
            name,
            stage,
            kind or verb.produces,
            resolved,
            inputs,
            environments,
            digests.of_json(identity),
            identity,
        )


def _draft(serve: ServeSection | None) -> tuple[str, ...]:
    """The folder that guesses for speculative decoding, if there is one."""
    return (serve.draft,) if serve and serve.draft else ()


_NOT_SCORED = {
    *("models", "name", "adapters", "questions", "prefer"),
    *("live_adapters", "adapter_slots", "adapter_targets", "max_rank", "watch_s"),
    *("front", "proof", "replicas", "engines", "drain_s", "log_requests"),
}
"""Keys of ``serve`` that an evaluation through the engine does not read."""


def _identifying(stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the keys that change nothing the stage makes."""
    return _without(config, {tuple(key.split(".")) for key in UNIDENTIFIED.get(stage, ())})


def _without(tree: Mapping[str, Any], paths: AbstractSet[tuple[str, ...]]) -> dict[str, Any]:
    kept = {}
    for key, value in tree.items():
        inner = {path[1:] for path in paths if path[0] == key}
        if () not in inner:
            kept[key] = _without(value, inner) if inner and isinstance(value, Mapping) else value
    return kept


def _natural_order(made: Mapping[str, Step]) -> list[Step]:
    """As a reader expects it: a model is scored as soon as it exists, serving comes last."""
    steps: list[Step] = []
    left = list(made.values())
    rank = {
        "fetch": 0,
        "data": 1,
        "evaluate": 2,
        "train": 3,
        "export": 4,
        "quantize": 5,
        "reference": 6,
        "serve": 7,
        "choose": 8,
    }
    while left:
        names = {s.name for s in steps}
        ready = [s for s in left if names.issuperset(s.inputs.values())]
        step = min(ready, key=lambda s: rank[s.stage])
        steps.append(step)
        left.remove(step)
    return steps
