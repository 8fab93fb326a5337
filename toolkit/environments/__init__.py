"""Environments: which Python a step runs in, made from a lock file or given by a profile.

A recipe names none; a stage names a logical environment (``train``), the machine's accelerator
makes it a lock (``train-cuda``), and ``toolkit env sync`` builds that once per user. A profile may
point to an interpreter instead.
"""

from toolkit.environments.build import Built, read_record, sync
from toolkit.environments.lockfile import Lock, load_lock, lock_names
from toolkit.environments.resolve import NAMES, Environment, detect_accelerator, from_lock, resolve

__all__ = [
    "NAMES",
    "Built",
    "Environment",
    "Lock",
    "detect_accelerator",
    "from_lock",
    "load_lock",
    "lock_names",
    "read_record",
    "resolve",
    "sync",
]
