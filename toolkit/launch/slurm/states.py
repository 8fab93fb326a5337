"""Slurm's words for a job's state, all that its documentation names up to version 25.11."""

from __future__ import annotations

from types import MappingProxyType

from toolkit.launch.states import State, translate

WORDS = MappingProxyType(
    {
        "PENDING": State.queued,
        "RESV_DEL_HOLD": State.queued,  # its reservation was deleted: held until somebody lets it go
        "REQUEUE_HOLD": State.queued,
        "SPECIAL_EXIT": State.queued,  # requeued and held, by a site's epilog
        "SUSPENDED": State.queued,  # stopped in its place: no heartbeats, and that is right
        "STOPPED": State.queued,
        "CONFIGURING": State.starting,
        "POWER_UP_NODE": State.starting,
        "EXPEDITING": State.starting,
        "RUNNING": State.running,
        "RESIZING": State.running,
        "SIGNALING": State.running,
        "UPDATE_DB": State.running,
        "COMPLETING": State.running,  # processes are still there
        "STAGE_OUT": State.running,
        "REQUEUED": State.preempted,
        "REQUEUE_FED": State.preempted,
        "PREEMPTED": State.preempted,
        "COMPLETED": State.succeeded,
        "CANCELLED": State.cancelled,
        "REVOKED": State.cancelled,  # a sibling in a federation took it
        "FAILED": State.failed,
        "TIMEOUT": State.failed,
        "DEADLINE": State.failed,
        "OUT_OF_MEMORY": State.failed,
        "NODE_FAIL": State.failed,
        "BOOT_FAIL": State.failed,
        "LAUNCH_FAILED": State.failed,
        "RECONFIG_FAIL": State.failed,
    }
)


def state_of(word: str, restarts: int = 0) -> State:
    """Slurm's word in ours. A job that waits and ran before was preempted.

    Raises:
        UnknownStateError: The word is in no table.
    """
    found = translate("Slurm", WORDS, word.partition(" ")[0])  # sacct: "CANCELLED by 1000"
    return State.preempted if found is State.queued and restarts else found
