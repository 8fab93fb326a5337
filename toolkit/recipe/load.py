"""Read a recipe and remember where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit import strict
from toolkit.errors import Problem, RecipeError
from toolkit.recipe.recipe import Recipe


@dataclass(frozen=True)
class Loaded:
    """A recipe and where it came from."""

    recipe: Recipe
    path: Path
    overrides: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """Folder that relative paths in the recipe start from."""
        return self.path.parent

    def with_engine(self, engine: str) -> Loaded:
        """The same with ``serve.engine`` decided, where the recipe leaves it open (``auto``)."""
        if self.recipe.serve is None:
            return self
        serve = self.recipe.serve.model_copy(update={"engine": engine})
        return replace(self, recipe=self.recipe.model_copy(update={"serve": serve}))

    def with_parallel(self, parallel: str) -> Loaded:
        """The same with ``train.parallel`` decided, where the recipe leaves it open (``auto``)."""
        if self.recipe.train is None:
            return self
        train = self.recipe.train.model_copy(update={"parallel": parallel})
        return replace(self, recipe=self.recipe.model_copy(update={"train": train}))


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read and check the recipe at ``path``, changed by ``KEY.PATH=VALUE`` overrides.

    Raises:
        RecipeError: With every problem: where, the key's path, what is wrong and the likely key.
    """
    if not path.exists():
        raise RecipeError(
            [Problem(str(path), "", "does not exist")],
            "`toolkit recipes list` shows the shipped ones; `toolkit init` starts one of yours",
        )
    return Loaded(strict.read(path, Recipe, overrides), path, tuple(overrides))
