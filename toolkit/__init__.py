"""From a recipe to a served model, and the proof that what is served is what was trained."""

__version__ = "0.1.0"
