"""Watching a run: speed against the device's own limit, memory, power, and a profile of a few steps.

``watch.py`` is what the step loop talks to. ``flops.py`` says how much work a step is, ``peak.py``
how fast this device multiplies, ``gpus.py`` what its driver says, ``profile.py`` records a window
of steps (``window.py``: which), ``plots.py`` draws what was logged.
"""
