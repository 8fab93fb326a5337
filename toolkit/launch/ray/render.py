"""From a job to the request that Ray's Jobs API is sent. Pure.

Ray gives the entrypoint to ``/bin/sh``, and replaces ``${NAME}`` in the variables of a runtime environment: so ours
stand in that line, quoted for the shell. In the runtime environment are Ray's own patience and, if asked for, a lock.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from toolkit import resources
from toolkit.errors import UsageError
from toolkit.launch.ray.section import RaySection
from toolkit.launch.spec import JobSpec

CANCEL_S = 20
"""Between SIGTERM and SIGKILL of a cancelled job, seconds; Ray's own patience is 3."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def submission_id(job: JobSpec, number: int) -> str:
    """Ray's id of the ``number``-th start of a job, from 1; Ray takes no id twice."""
    return job.id if number == 1 else f"{job.id}-r{number}"


def request(job: JobSpec, section: RaySection, number: int = 1) -> str:
    """The body of the request as JSON, byte for byte what is sent.

    Args:
        job: The job.
        section: The cluster.
        number: Which start of this job it is, from 1.

    Raises:
        UsageError: The job needs several nodes, or a secret is not where a node can find it.
    """
    taken, name = job.resources, submission_id(job, number)
    if taken.nodes > 1:
        raise UsageError(
            f"step {job.step} wants {taken.nodes} nodes, and a Ray job starts on one",
            "train on one node here (no `nodes` in the profile), or on Slurm or Kubernetes",
        )
    body: dict[str, Any] = {
        "submission_id": name,
        "entrypoint": entrypoint(job, name),
        # At least one core: without any resource Ray runs a job on its head.
        "entrypoint_num_cpus": taken.cpus,
        "entrypoint_num_gpus": taken.gpus,
        "metadata": {"toolkit.job": job.id, "toolkit.chain": job.chain, "toolkit.step": job.step},
        "runtime_env": _runtime_env(job, section),
    }
    if taken.memory_gib:
        body["entrypoint_memory"] = round(taken.memory_gib * 2**30)
    if section.resources:
        body["entrypoint_resources"] = dict(section.resources)
    if section.labels:
        body["entrypoint_label_selector"] = dict(section.labels)
    return json.dumps(body, indent=1) + "\n"


def _runtime_env(job: JobSpec, section: RaySection) -> dict[str, Any]:
    """The lock is that of the kept code, which every node sees: its path is new when its content is."""
    found: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(CANCEL_S)}}
    if section.runtime_env == "lock":
        code = Path(job.env["PYTHONPATH"].split(os.pathsep)[0])
        lock = code / resources.locks().relative_to(resources.PACKAGE.parent) / "core.txt"
        found["pip"] = {"packages": [f"-r {shlex.quote(str(lock))}"]}
    return found


def entrypoint(job: JobSpec, name: str) -> str:
    """One line of POSIX shell: secrets from where the node has them, then our variables and the program itself."""
    own = {"TOOLKIT_ENGINE_ID": name, "TOOLKIT_START": name, **job.env}
    words = ["env", *(f"{key}={value}" for key, value in sorted(own.items()))]
    if "=" in job.argv[0]:  # `env` would take it for a variable
        words += ["sh", "-c", 'exec "$@"', "sh"]
    secrets = [_secret(*one) for one in sorted(job.secrets.items())]
    return " && ".join([*secrets, f"exec {shlex.join([*words, *job.argv])}"])


def _secret(variable: str, place: str) -> str:
    """Shell that exports a secret; the value is read on the node and is in no request."""
    kind, _, where = place.partition(":")
    if kind == "file" and where.startswith("/") and _NAME.fullmatch(variable):
        return f'{variable}="$(cat {shlex.quote(where)})" && export {variable}'
    if kind == "env" and _NAME.fullmatch(where) and _NAME.fullmatch(variable):
        return f'{variable}="${{{where}:?}}" && export {variable}'
    raise UsageError(
        f"the profile's secret {variable} is at {place!r}, where no node of Ray can find it",
        f"write secrets: {{{variable}: file:/path/that/nodes/see}}, or env:NAME for a variable of the nodes",
    )
