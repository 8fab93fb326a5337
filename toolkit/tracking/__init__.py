"""Tracking: what runs say to MLflow, by way of the disk, so that a lost server never stops work.

``check`` and ``resolve`` import no MLflow; runs import it in their background thread.
"""

from toolkit.tracking.describe import Dataset, GitState, flatten, git_state
from toolkit.tracking.replay import Replayed, sync
from toolkit.tracking.run import RecipeRun, StepRun
from toolkit.tracking.store import Store, check, resolve

__all__ = [
    "Dataset",
    "GitState",
    "RecipeRun",
    "Replayed",
    "StepRun",
    "Store",
    "check",
    "flatten",
    "git_state",
    "resolve",
    "sync",
]
