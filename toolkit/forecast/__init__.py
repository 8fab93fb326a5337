"""How much GPU memory a step takes, said before it runs. Pure: no torch, no reading, under a millisecond.

``training.py``, ``quantizing.py`` and ``serving.py`` have the formulas with their sources;
``changes.py`` finds the smallest change that fits; ``steps.py`` applies them to a recipe.
"""
