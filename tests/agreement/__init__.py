"""Real engines are given the fixtures of preflight, and what they do is compared with what it says."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.folders import model_folder
from tests.preflight_cases import Case, adapter_cases, recipe_cases
from toolkit.preflight import Outcome, check, gather
from toolkit.recipe import Recipe

HERE = Path(__file__).parent

INCOMPLETE = ("KeyError", "Missing required", "Cannot find any of")
"""Reasons of an engine that speak of the fixture, not of what it is about."""


def base_folder(folder: Path) -> Path:
    """A small Llama with random weights, and heads as wide as GPU kernels like them."""
    return model_folder(folder, is_random=True, num_attention_heads=4, num_key_value_heads=2)


def job(
    folder: Path, engine: str, options: Mapping[str, Any], more: Mapping[str, Path] | None = None
) -> Path:
    """Write every case that the engine is to be given; ``more`` are further adapters."""
    base = base_folder(folder / "base")
    adapters = {}
    for case in adapter_cases((engine,)):
        if engine in case.real:
            (folder / "adapters" / case.name).mkdir(parents=True)
            case.write(folder / "adapters" / case.name)
            adapters[case.name] = str(folder / "adapters" / case.name / "a")
    bases = {}
    for case in recipe_cases():
        if engine in case.real:
            (folder / "bases" / case.name).mkdir(parents=True)
            case.write(folder / "bases" / case.name)
            length = case.recipe.get("model", {}).get("max_length", 1024)
            model = str(folder / "bases" / case.name / "model")
            bases[case.name] = {"folder": model, "max_length": length}
    adapters |= {name: str(path) for name, path in (more or {}).items()}
    file = folder / "job.json"
    file.write_text(
        json.dumps(
            {
                "base": str(base),
                "adapters": adapters,
                "bases": bases,
                "options": dict(options),
                "answers": str(folder / "answers.json"),
            }
        )
    )
    return file


def ask(
    command: list[str], script: str, file: Path, env: Mapping[str, str], limit_s: int
) -> dict[str, Any]:
    """Run a script of this folder in an engine's interpreter; its answers."""
    done = subprocess.run(
        [*command, str(HERE / script), str(file)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    answers = file.with_name("answers.json")
    if not answers.exists():
        raise AssertionError(f"{script} exited with {done.returncode}:\n{done.stderr[-6000:]}")
    found: dict[str, Any] = json.loads(answers.read_text())
    print(json.dumps({k: found.get(k) for k in ("version", "seconds", "noise")}))
    return found


def surprises(engine: str, answers: Mapping[str, Any]) -> Iterator[str]:
    """Cases in which the engine does something else than the fixture says."""
    adapters: list[Case] = [c for c in adapter_cases((engine,)) if engine in c.real]
    bases = [c for c in recipe_cases() if engine in c.real]
    for kind, cases in (("adapters", adapters), ("bases", bases)):
        for case in cases:
            answer = answers[kind].get(case.name, {"does": "nothing", "why": "not asked"})
            if answer["does"] != case.real[engine] or answer["why"].startswith(INCOMPLETE):
                yield f"{case.name}: said {case.real[engine]}, but {answer['does']}: {answer['why']}"


def outcome(engine: str, base: Path, adapter: Path) -> Outcome:
    """Preflight's worst verdict on an adapter of this machine, on a CPU for vLLM 0.32 and on a GPU else."""
    name, _, version = engine.partition(" ")
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "model": {"source": str(base), "max_length": 64},
            "serve": {"engine": name, "adapters": [{"name": "a", "path": str(adapter)}]},
        }
    )
    place = "cpu" if version == "0.32.0" else "cuda"
    facts = gather(recipe, base.parent, accelerator=place, engine_version=version)
    outcomes = {v.outcome for v in check(recipe, facts) if v.rule.startswith("adapter.")}
    order = (Outcome.refuse, Outcome.warn, Outcome.ok)
    return next(o for o in order if o in outcomes)


HARMS = ("refuses", "dies", "ignores")


def disagreements(
    engine: str, base: Path, made: Mapping[str, Path], answers: Mapping[str, Any]
) -> Iterator[str]:
    """Adapters made by PEFT that preflight lets through and the engine does not serve."""
    for name, folder in made.items():
        answer, said = answers["adapters"][name], outcome(engine, base, folder)
        if answer["does"] in HARMS and said is not Outcome.refuse:
            yield f"{name}: preflight says {said}, but the engine {answer['does']}: {answer['why']}"
