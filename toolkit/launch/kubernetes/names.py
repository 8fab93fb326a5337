"""Names and labels: how a job of ours is found again in the cluster."""

from __future__ import annotations

import hashlib
import re

MANAGED = {"app.kubernetes.io/managed-by": "toolkit"}
JOB, CHAIN, STAGE = "toolkit/job", "toolkit/chain", "toolkit/stage"
OBJECT, TRY = "toolkit/object", "toolkit/try"
"""Labels of ours, on objects and their pods: whose they are, the object's own name, and which start of the job it is.
Each start over is a new object, so that what the old one said stays readable."""

CONTAINER = "step"
GROUP = "n"
"""The one group of nodes of a JobSet; short, because it is part of names that may have 63 characters."""
SET_NAME_AT_MOST = 63 - len(f"-{GROUP}-0-999-abcde")
SUFFIX = "-r{number}"

NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def object_name(job_id: str, number: int, *, several: bool) -> str:
    """Name of the object for the ``number``-th start, from 1; for JobSets short enough for their pods."""
    suffix = "" if number == 1 else SUFFIX.format(number=number)
    most = SET_NAME_AT_MOST if several else 63
    if len(job_id) + len(suffix) > most or (several and not job_id[0].isalpha()):
        digest = hashlib.sha256(job_id.encode()).hexdigest()[:8]
        job_id = f"t-{job_id}" if not job_id[0].isalpha() else job_id
        job_id = job_id[: most - len(suffix) - len(digest) - 1].rstrip("-") + f"-{digest}"
    return job_id + suffix


def label(value: str) -> str:
    """``value`` where a label may hold it, else what is left of it; ids of ours always may."""
    if _LABEL.fullmatch(value):
        return value
    return re.sub(r"[^A-Za-z0-9]+", "-", value)[:63].strip("-")


def split(engine_id: str) -> tuple[str, str]:
    """``(kind, name)`` of ``job/NAME`` or ``jobset/NAME``, as ``kubectl get`` takes them."""
    kind, _, name = engine_id.partition("/")
    return kind, name
