"""Which environments a recipe needs."""

from __future__ import annotations

from pathlib import Path


def recipe_environments(path: Path) -> tuple[str, ...]:
    """Logical environments, besides core, of the steps of the recipe at ``path``.

    Raises:
        RecipeError: The recipe is wrong, or a file that it names is missing.
    """
    from toolkit import prepare
    from toolkit.environments import resolve
    from toolkit.launch import profiles
    from toolkit.observe import observe
    from toolkit.plan import make_plan
    from toolkit.recipe.load import load
    from toolkit.workspace import Workspace

    loaded, where = load(path), profiles.load()
    observed = observe(loaded, {})
    engines = {
        name: resolve(name, accelerator=where.accelerator) for name in prepare.engines_of(loaded)
    }
    space = Workspace.locate()
    loaded, _ = prepare.decided(loaded, observed, space, engines, where.device)
    steps = make_plan(loaded, observed).steps
    names = (name for step in steps for name in step.environments if name != "core")
    return tuple(dict.fromkeys(names))
