"""What jobs cost: GPU-hours, from the times in their folders."""

from __future__ import annotations

import time
from pathlib import Path

from toolkit.launch.folder import Attempt, JobFolder
from toolkit.launch.spec import JobSpec


def seconds(attempt: Attempt) -> float:
    """How long an attempt ran, or has run so far."""
    begun, ended = attempt.started, attempt.ended
    if begun is None:
        return 0.0
    if ended:
        return max(0.0, float(ended["at"] - begun["at"]))
    return max(0.0, float(time.time() - (attempt.beat_age_s() or 0.0) - begun["at"]))


def gpu_hours(job: JobFolder) -> float:
    """GPUs times hours of all attempts on all nodes, whether they were any use or not."""
    resources = job.spec.resources
    gpus = resources.gpus * resources.nodes
    return float(gpus * sum(map(seconds, job.attempts)) / 3600) if gpus else 0.0


def of_chain(folder: Path) -> float:
    """GPU-hours of all jobs of a chain."""
    return sum(gpu_hours(JobFolder(path.parent)) for path in folder.glob("*/job.json"))


def at_most(spec: JobSpec) -> float:
    """GPU-hours of one try up to its time limit; nothing is known, and 0, without one."""
    resources = spec.resources
    return resources.gpus * resources.nodes * (resources.time_limit_s or 0) / 3600
