"""Which environments a recipe needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from toolkit.recipe.recipe import Recipe


def recipe_environments(recipe: Recipe | Path) -> tuple[str, ...]:
    """Logical environments, besides core, of the stages and the engine that a recipe uses.

    Args:
        recipe: The recipe, or its file.
    """
    if isinstance(recipe, Path):
        from toolkit.recipe.load import load_recipe

        recipe = load_recipe(recipe)
    return tuple(dict.fromkeys(name for name in _environments(recipe) if name != "core"))


def _environments(recipe: Recipe) -> Iterator[str]:
    from toolkit.stages import STAGES

    stages = {
        "fetch": True,
        "data": recipe.data,
        "train": recipe.train,
        "export": recipe.export or recipe.train,
        "quantize": recipe.quantize,
        "evaluate": recipe.evaluate,
        "serve": recipe.serve,
    }
    yield from (STAGES[verb].environment for verb, used in stages.items() if used)
    engine = recipe.serve.engine if recipe.serve else None
    if engine:
        yield engine
    if recipe.evaluate and getattr(recipe.evaluate, "through", None) == "engine":
        yield engine or "vllm"
