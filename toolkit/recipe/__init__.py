"""Recipes: strict, frozen, read from YAML with the line of every mistake."""

from toolkit.recipe.recipe import Recipe

__all__ = ["Recipe"]
