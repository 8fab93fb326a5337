"""Reads ``tests/unit/preflight_cases/``: recipes, bases and adapters with the verdict that preflight must give.

``adapters.yaml`` says too what the real engines do with each adapter; ``tests/integration`` and ``tests/gpu``
give the same folders to them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.folders import LLAMA, adapter_folder, model_folder, safetensors
from toolkit.preflight import Verdict, check, gather
from toolkit.preflight.gpu import GpuFacts
from toolkit.recipe import Recipe

FOLDER = Path(__file__).parent / "unit" / "preflight_cases"

TRAIN = {"data": {"sources": [{"path": "rows.jsonl"}]}, "train": {}}

ENGINES = ("vllm 0.32.0", "vllm 0.26.0", "sglang 0.5.17")
"""Engines that an adapter's case is judged for, unless it names others."""

ON_CPU = ("vllm 0.32.0",)


@dataclass(frozen=True)
class Case:
    """One fixture.

    Attributes:
        name: For people.
        rule: The rule it is about.
        expect: ``ok``, ``warn`` or ``refuse``; for an adapter perhaps by engine.
        engine: Name and version; empty for that of the shipped lock.
        accelerator: ``cpu`` or ``cuda``.
        ranks: Processes that train together.
        gpu: Fields of GpuFacts, with ``memory_gib`` and ``used_gib``.
        recipe: Sections besides ``name`` and ``model``.
        trains: Whether the recipe has data and trains.
        base: Changes to the config of a small Llama.
        files: Changes to the base's folder: ``cut``, ``no_template``, ``packed`` and so on.
        adapters: Name -> (adapter_config.json, tensors).
        says: Words of the message.
        fix: Words of the hint.
        allows: Other rules that may say something too.
        also: With ``expect: ok``, other rules that look at what it holds and find nothing.
        real: Engine -> what it was seen to do.
    """

    name: str
    rule: str
    expect: str
    engine: str = ""
    accelerator: str = "cpu"
    gpu: dict[str, Any] | None = None
    ranks: int = 1
    recipe: dict[str, Any] = field(default_factory=dict)
    trains: bool = False
    base: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)
    says: str = ""
    fix: str = ""
    allows: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    real: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Make the base and the adapters."""
        if self.files.get("absent"):
            return
        base = model_folder(folder / "model", **self.base)
        if self.files.get("no_template"):
            (base / "chat_template.jinja").unlink()
        if self.files.get("pickled"):
            (base / "model.safetensors").rename(base / "pytorch_model.bin")
        if cut := self.files.get("cut"):
            with (base / "model.safetensors").open("r+b") as file:
                file.truncate((base / "model.safetensors").stat().st_size - cut)
        if shards := self.files.get("index"):
            index = {"weight_map": {f"t{i}": name for i, name in enumerate(shards)}}
            (base / "model.safetensors.index.json").write_text(json.dumps(index))
        if shapes := self.files.get("tensors"):  # in place of a Llama's
            safetensors(
                base / "model.safetensors", {name: tuple(shape) for name, shape in shapes.items()}
            )
        (folder / "rows.jsonl").touch()
        for name, (config, tensors) in self.adapters.items():
            if "absent" not in tensors:
                adapter_folder(folder / name, tensors=tensors, **config)

    def judge(self, folder: Path) -> list[Verdict]:
        """Every verdict."""
        self.write(folder)
        recipe = {"name": "r", "model": {"source": "./model", "max_length": 1024}} | self.recipe
        recipe = (TRAIN | recipe) if self.trains else recipe
        if self.adapters:
            named = [{"name": name, "path": f"./{name}"} for name in self.adapters]
            engine = {"engine": self.engine.partition(" ")[0]} if " " in self.engine else {}
            recipe["serve"] = engine | {"adapters": named} | recipe.get("serve", {})
        made = Recipe.model_validate(recipe)
        facts = gather(
            made,
            folder,
            accelerator="cuda" if self.accelerator == "cuda" else "cpu",
            engine_version=self.engine.rpartition(" ")[2] or None,
            gpu=_gpu(self.gpu),
        )
        return check(made, replace(facts, ranks=self.ranks))


def _gpu(given: dict[str, Any] | None) -> GpuFacts | None:
    if given is None:
        return None
    changed = dict(given)
    memory, used = changed.pop("memory_gib", None), changed.pop("used_gib", 0)
    return GpuFacts(
        memory_bytes=None if memory is None else memory * 2**30, used_bytes=used * 2**30, **changed
    )


def recipe_cases() -> list[Case]:
    """Cases of every file but adapters.yaml, by name."""
    files = (file for file in sorted(FOLDER.glob("*.yaml")) if file.stem != "adapters")
    return [_recipe_case(entry) for file in files for entry in _entries(file)]


def _recipe_case(given: dict[str, Any]) -> Case:
    entry = dict(given)
    adapters = {
        name: (one.get("config", {}), one.get("tensors", {}))
        for name, one in entry.pop("adapters", {}).items()
    }
    allows, also = tuple(entry.pop("allows", ())), tuple(entry.pop("also", ()))
    return Case(**entry, adapters=adapters, allows=allows, also=also)


def adapter_cases(engines: tuple[str, ...] = ()) -> list[Case]:
    """Each case of adapters.yaml for each of its engines, or for those of ``engines`` only."""
    return [
        case
        for entry in _entries(FOLDER / "adapters.yaml")
        for case in _for_engines(entry, engines)
    ]


def _for_engines(entry: dict[str, Any], wanted: tuple[str, ...]) -> list[Case]:
    expect, real = entry["expect"], entry.get("real", {})
    named = list(expect) if isinstance(expect, dict) else entry.get("engines", list(ENGINES))
    plain = Case(
        name=entry["name"],
        rule=entry["rule"],
        expect="",
        adapters={"a": (entry.get("adapter", {}), entry.get("tensors", {}))},
        says=entry.get("says", ""),
        fix=entry.get("fix", ""),
        allows=tuple(entry.get("allows", ())),
        also=tuple(entry.get("also", ())),
        base=entry.get("base", {}),
    )
    return [
        replace(
            plain,
            engine=engine,
            accelerator="cpu" if engine in ON_CPU else "cuda",
            expect=expect[engine] if isinstance(expect, dict) else expect,
            real=dict.fromkeys(ENGINES, real) if isinstance(real, str) else real,
        )
        for engine in named
        if not wanted or engine in wanted
    ]


@cache
def _entries(file: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = yaml.safe_load(file.read_text())
    return entries


__all__ = ["ENGINES", "LLAMA", "Case", "adapter_cases", "recipe_cases"]
