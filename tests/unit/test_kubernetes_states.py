"""What a Job and its pods say, in our words: every row of the tables, and what it means for the job."""

from datetime import UTC, datetime

import pytest

from toolkit.errors import UnknownStateError
from toolkit.launch.kubernetes.seen import ENDS, TAKEN, WAITS, pod_seen, seen
from toolkit.launch.kubernetes.stuck import STUCK, given_up
from toolkit.launch.states import Cause, State

REACHED = "Job has reached the specified backoff limit"
CODE_75 = (
    "Container step for pod ml/t-abcde failed with exit code 75 matching FailJob rule at index 0"
)
DISRUPTED = "Pod ml/t-abcde has condition DisruptionTarget matching FailJob rule at index 1"


def job(*conditions, suspend=False, deleted=False):
    return {
        "metadata": {"name": "t", **({"deletionTimestamp": "now"} if deleted else {})},
        "spec": {"suspend": suspend},
        "status": {"conditions": [condition(*one) for one in conditions]},
    }


def condition(kind, reason=None, message=None, status="True"):
    return {"type": kind, "status": status, "reason": reason, "message": message}


def pod(phase, *conditions, node="node-1", state=None, reason=None, deleted=False):
    containers = [{"name": "step", "state": state}] if state else []
    return {
        "metadata": {"name": "t-abcde", **({"deletionTimestamp": "now"} if deleted else {})},
        "spec": {"nodeName": node} if node else {},
        "status": {
            "phase": phase,
            "conditions": [condition(*one) for one in conditions],
            "containerStatuses": containers,
            **({"reason": reason, "message": "said the kubelet"} if reason else {}),
        },
    }


def ended(code, reason="Error", message=None):
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


def failed(*pods, reason="BackoffLimitExceeded", message=REACHED):
    return seen(job(("Failed", reason, message)), pods)


def test_a_job_without_pods_is_queued():
    assert seen(job(), []).state is State.queued


def test_a_suspended_job_is_queued_with_kueues_reason():
    found = seen(job(("Suspended", "JobSuspended", "waits for quota"), suspend=True), [])
    assert (found.state, found.word, found.reason) == (State.queued, "Suspended", "waits for quota")


def test_a_job_suspended_while_its_pod_uses_its_grace_is_still_running():
    found = seen(job(suspend=True), [pod("Running", deleted=True)])
    assert (found.state, found.word) == (State.running, "Terminating")


def test_a_pod_that_fits_nowhere_is_queued_with_the_schedulers_reason():
    text = "0/9 nodes are available: 9 Insufficient nvidia.com/gpu."
    waits = pod("Pending", ("PodScheduled", "Unschedulable", text, "False"), node=None)
    found = seen(job(), [waits])
    assert (found.state, found.word, found.reason) == (State.queued, "Unschedulable", text)


@pytest.mark.parametrize("word", [w for w, state in WAITS.items() if state is State.starting])
def test_a_container_that_is_not_there_yet_is_starting_with_its_reason(word):
    waits = pod("Pending", ("PodScheduled",), state={"waiting": {"reason": word, "message": "why"}})
    if word == "Scheduled":
        waits["status"]["containerStatuses"] = []
    found = seen(job(), [waits])
    assert (found.state, found.word) == (State.starting, word)
    assert found.host == "node-1"


TAKEN_AT = 1_790_000_000.0


def stuck_pod(word, message="why"):
    waits = pod(
        "Pending", ("PodScheduled",), state={"waiting": {"reason": word, "message": message}}
    )
    waits["status"]["startTime"] = datetime.fromtimestamp(TAKEN_AT, UTC).strftime(
        "%Y-%m-%dT%H:%M:%SZ"
    )
    return waits


def test_whatever_a_kubelet_cannot_do_ends_some_time_but_large_images_have_time():
    words = {word for word, state in WAITS.items() if state is State.starting}
    assert words - set(STUCK) == {"Scheduled", "PodInitializing", "ContainerCreating"}
    assert set(STUCK) <= words


@pytest.mark.parametrize(("word", "cause"), STUCK.items())
def test_a_pod_that_cannot_begin_is_given_up_after_the_patience_of_the_profile(word, cause):
    waits = stuck_pod(word)
    before = given_up(pod_seen(waits), waits, 900, TAKEN_AT + 899)
    assert (before.state, before.cause, before.reason) == (State.starting, None, "why")
    after = given_up(pod_seen(waits), waits, 900, TAKEN_AT + 901)
    assert after.state is (State.preempted if cause is Cause.lost else State.failed)
    assert (after.cause, after.word, after.host) == (cause, word, "node-1")
    assert after.reason == f"{word}: why (for 900 s: kubernetes.start_timeout_s)"


def test_a_pod_that_creates_its_container_or_waits_for_a_node_is_never_given_up():
    waits = stuck_pod("ContainerCreating", None)
    assert given_up(pod_seen(waits), waits, 1).state is State.starting
    queued = pod("Pending", ("PodScheduled", "Unschedulable", "no room", "False"), node=None)
    assert given_up(pod_seen(queued), queued, 1).state is State.queued


def test_one_node_that_cannot_begin_ends_the_job():
    assert seen(job(), [pod("Running"), stuck_pod("ErrImagePull")], 900).state is State.failed
    assert seen(job(), [pod("Running"), stuck_pod("ErrImagePull")]).state is State.starting


def test_several_nodes_are_as_far_as_the_last_of_them():
    waits = pod("Pending", ("PodScheduled", "Unschedulable", "no room", "False"), node=None)
    assert seen(job(), [pod("Running"), waits]).state is State.queued
    assert seen(job(), [pod("Running"), pod("Running")]).state is State.running
    assert seen(job(), [pod("Succeeded"), pod("Running")]).state is State.running


def test_a_node_that_does_not_answer_is_left_to_the_heartbeats():
    found = seen(job(), [pod("Unknown", reason="NodeLost")])
    assert (found.state, found.word, found.reason) == (State.running, "Unknown", "said the kubelet")


def test_a_deleted_job_runs_until_its_pods_are_gone():
    assert seen(job(deleted=True), [pod("Running", deleted=True)]).word == "Terminating"


def test_a_complete_job_succeeded():
    found = seen(job(("Complete", "CompletionsReached")), [pod("Succeeded")])
    assert (found.state, found.exit_code, found.host) == (State.succeeded, 0, "node-1")
    assert seen(job(("Completed", "AllJobsCompleted")), []).state is State.succeeded


@pytest.mark.parametrize(
    ("code", "state", "cause"),
    [
        (1, State.failed, Cause.failed),
        (2, State.failed, Cause.usage),
        (3, State.failed, Cause.not_installed),
        (75, State.preempted, Cause.preempted),
        (143, State.failed, Cause.failed),
    ],
)
def test_exit_codes_tell_the_cause(code, state, cause):
    found = failed(pod("Failed", state=ended(code, message="first\nlast words\n")))
    assert (found.state, found.cause, found.exit_code) == (state, cause, code)
    assert found.reason == "last words"


@pytest.mark.parametrize("word", [word for word in ENDS if word not in ("Completed", "Error")])
def test_reasons_of_containers_tell_the_cause(word):
    found = failed(pod("Failed", state=ended(137, word)))
    assert (found.cause, found.word) == (ENDS[word], word)
    assert found.state is (State.preempted if ENDS[word].retried else State.failed)


def test_out_of_memory_is_not_tried_again():
    found = failed(pod("Failed", state=ended(137, "OOMKilled")))
    assert (found.state, found.cause) == (State.failed, Cause.out_of_memory)


@pytest.mark.parametrize("word", TAKEN)
def test_what_the_cluster_takes_away_is_no_fault_of_the_job(word):
    by_kubelet = failed(pod("Failed", state=ended(143), reason=word))
    by_control_plane = failed(pod("Failed", ("DisruptionTarget", word, "why"), state=ended(143)))
    assert (by_kubelet.cause, by_control_plane.cause) == (TAKEN[word], TAKEN[word])
    assert by_control_plane.reason == "why"
    assert (by_kubelet.state is State.preempted) == (word != "DeadlineExceeded")


def test_the_shims_own_word_counts_more_than_the_clusters():
    taken = pod("Failed", ("DisruptionTarget", "PreemptionByScheduler"), state=ended(2))
    assert failed(taken).cause is Cause.usage


def test_a_pod_that_a_node_refused_never_ran():
    refused = pod("Failed", reason="UnexpectedAdmissionError")
    assert (failed(refused).state, failed(refused).cause) == (State.preempted, Cause.lost)


def test_of_several_nodes_what_the_cluster_took_explains_the_others():
    taken = pod("Failed", ("DisruptionTarget", "DeletionByTaintManager"), state=ended(137))
    peer = pod("Failed", state=ended(1, message="NCCL error: remote process exited"))
    assert failed(peer, taken).cause is Cause.lost


def test_of_several_nodes_the_one_that_failed_by_itself_explains_those_that_were_stopped():
    stopped, culprit = pod("Failed", state=ended(75)), pod("Failed", state=ended(1, message="bad"))
    for order in ([stopped, culprit], [culprit, stopped]):
        assert (failed(*order).cause, failed(*order).reason) == (Cause.failed, "bad")


@pytest.mark.parametrize(
    ("reason", "message", "state", "cause", "code"),
    [
        ("PodFailurePolicy", CODE_75, State.preempted, Cause.preempted, 75),
        ("PodFailurePolicy", DISRUPTED, State.preempted, Cause.preempted, None),
        ("BackoffLimitExceeded", REACHED, State.preempted, Cause.lost, None),
        ("DeadlineExceeded", "Job was active longer than allowed", State.failed, Cause.time_limit, None),
        ("FailedJobs", "jobset failed", State.failed, Cause.failed, None),
    ],
)  # fmt: skip
def test_a_failed_job_whose_pods_are_gone_is_known_by_its_own_message(
    reason, message, state, cause, code
):
    found = failed(reason=reason, message=message)
    assert (found.state, found.cause, found.exit_code) == (state, cause, code)


@pytest.mark.parametrize(
    "strange",
    [
        lambda: pod_seen(pod("Limbo")),
        lambda: pod_seen(pod("Pending", state={"waiting": {"reason": "Limbo"}})),
        lambda: pod_seen(pod("Failed", state=ended(1, "Limbo"))),
        lambda: pod_seen(pod("Failed", reason="Limbo")),
        lambda: failed(reason="Limbo"),
    ],
)
def test_a_word_that_no_table_has_is_an_error(strange):
    with pytest.raises(UnknownStateError, match="Kubernetes says that a job is 'Limbo'") as no:
        strange()
    assert "please report it" in no.value.hint
