"""What Ray says of a job, in our words. Pure, from the API's objects as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.launch import causes
from toolkit.launch.states import PREEMPTED, Cause, Seen, State, translate

STATUSES: Mapping[str, State] = {
    "PENDING": State.queued,
    "RUNNING": State.running,
    "SUCCEEDED": State.succeeded,
    "STOPPED": State.cancelled,
    "FAILED": State.failed,
}

GAVE_UP = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
"""Ray waits 15 minutes for room (``RAY_JOB_START_TIMEOUT_SECONDS`` of the head), then it calls a job failed."""

ERRORS: Mapping[str, Cause] = {
    "JOB_ENTRYPOINT_COMMAND_ERROR": Cause.failed,  # the exit code says more
    "JOB_ENTRYPOINT_COMMAND_START_ERROR": Cause.not_installed,
    "RUNTIME_ENV_SETUP_FAILURE": Cause.not_installed,
    GAVE_UP: Cause.lost,
    # The actor that watches a job: it goes with its node, and nothing is wrong with the job.
    "JOB_SUPERVISOR_ACTOR_START_FAILURE": Cause.lost,
    "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE": Cause.lost,
    "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE": Cause.lost,
    "JOB_SUPERVISOR_ACTOR_DIED": Cause.lost,
}
"""``error_type`` of jobs that failed."""

MESSAGE_AT_MOST = 300
COMMAND = "Running entrypoint for job"


def seen(job: Mapping[str, Any]) -> Seen:
    """One job.

    Raises:
        UnknownStateError: A word that is in none of the tables.
    """
    word, message = job["status"], _said(job)
    state = translate("Ray", STATUSES, word)
    host = (job.get("driver_info") or {}).get("node_ip_address") or _host(job)
    if state is State.failed:
        return _failed(job, message, host)
    code = job.get("driver_exit_code")
    cause = {State.succeeded: Cause.done, State.cancelled: Cause.cancelled}.get(state)
    return Seen(state, word, None if cause is Cause.done else message, code, host, cause)


def _failed(job: Mapping[str, Any], message: str | None, host: str | None) -> Seen:
    word, code = job.get("error_type"), job.get("driver_exit_code")
    if word is None:  # Ray before 2.43 had no such word
        return Seen(State.failed, "FAILED", message, code, host, _by_code(code))
    if word == GAVE_UP:
        return Seen(State.retrying, word, message, code, host)
    cause = translate("Ray", ERRORS, word)
    if word == "JOB_ENTRYPOINT_COMMAND_ERROR":
        cause = _by_code(code)
    state = State.preempted if cause.retried else State.failed
    return Seen(state, word, message, code, host, cause)


def _by_code(code: int | None) -> Cause:
    if code is None:
        return Cause.failed
    return Cause.preempted if code == PREEMPTED else causes.of_exit(code, False)


def _host(job: Mapping[str, Any]) -> str | None:
    """``http://10.0.0.7:52365`` is the agent on the job's node."""
    found = str(job.get("driver_agent_http_address") or "").rpartition("//")[2]
    return found.rpartition(":")[0] or None


def _said(job: Mapping[str, Any]) -> str | None:
    """Ray puts the end of the log into its message; its last line says enough.

    What Ray says of the command itself may stand behind the words of one that ends at once: it is in a
    buffer when the command starts.
    """
    message = str(job.get("message") or "").replace(str(job.get("entrypoint") or "\0"), "")
    lines = [line for line in message.strip().splitlines() if not line.startswith(COMMAND)]
    return lines[-1][:MESSAGE_AT_MOST] if lines else None
