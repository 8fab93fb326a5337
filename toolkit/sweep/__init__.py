"""Sweeps: one recipe with other values, again and again, each time as an ordinary chain of jobs.

Begin with ``draft.py`` (a recipe becomes a checked sweep), then ``folder.py`` (what is on disk) and ``driver.py`` (the
process that sees it to its end); ``space.py`` chooses values, ``page.py`` is what MLflow shows.
"""
