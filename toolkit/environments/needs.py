"""Which environments a recipe needs."""

from __future__ import annotations

from pathlib import Path


def recipe_environments(path: Path) -> tuple[str, ...]:
    """Logical environments, besides core, of the steps of the recipe at ``path``.

    Raises:
        RecipeError: The recipe is wrong, or a file that it names is missing.
    """
    from toolkit.observe import observe
    from toolkit.plan import make_plan
    from toolkit.recipe.load import load

    loaded = load(path)
    steps = make_plan(loaded, observe(loaded, {})).steps
    names = (name for step in steps for name in step.environments if name != "core")
    return tuple(dict.fromkeys(names))
