"""Tests that need torch run in a stage's environment; the core's pytest skips their folders."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torch") else ["in_*"]
