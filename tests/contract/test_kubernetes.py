"""What a cluster does to jobs, seen through to their end by the keeper."""

import time

import pytest

from tests.contract.engines import ENGINES
from tests.contract.test_contract import PROGRAM, _wait_for, told
from tests.contract.world import World
from toolkit.launch.states import State

pytestmark = pytest.mark.integration
JOBS = "/apis/batch/v1/namespaces/ml/jobs"


@pytest.fixture(scope="module")
def world(tmp_path_factory, request):
    made = ENGINES["kubernetes"](tmp_path_factory.mktemp("kubernetes"), request)
    yield made
    made.close()


def counts(world, tmp_path, target=40):
    """A job that counts, and has begun."""
    chain = world.submit((*PROGRAM, "count", tmp_path / "a", target, 0.1))
    _wait_for(lambda: len(told(tmp_path / "a" / "counted")) > 3, "progress")
    [pod] = world.cluster.pods(f"{chain}-01-step")
    return chain, pod["metadata"]["name"]


@pytest.mark.parametrize("reason", ["PreemptionByScheduler", "EvictionByEvictionAPI"])
def test_a_preempted_pod_keeps_its_state_and_goes_on_as_another_job(world, tmp_path, reason):
    chain, pod = counts(world, tmp_path)
    world.cluster.disrupt(pod, reason)
    report = world.ended(chain)
    assert (report.state, report.attempts) == (State.succeeded, 2)
    assert report.engine_id == f"job/{chain}-01-step-r2"
    assert [n for (n,) in told(tmp_path / "a" / "counted")] == list(range(1, 41))


def test_a_pod_that_its_node_refused_is_given_to_another(world, tmp_path):
    world.cluster.images = set()
    chain = world.submit((*PROGRAM, "say", tmp_path / "said", "once"))
    waiting = world.wait(chain, State.starting)
    assert waiting.word in ("ContainerCreating", "ImagePullBackOff")
    [pod] = world.cluster.pods(f"{chain}-01-step")
    world.cluster.refuse(pod["metadata"]["name"])
    world.cluster.images = None
    report = world.ended(chain)
    assert (report.state, report.attempts) == (State.succeeded, 2)
    assert world.job(chain).attempts[0].ended["cause"] == "lost"
    assert told(tmp_path / "said") == [["once"]]


@pytest.fixture
def impatient(world, tmp_path):
    made = World(tmp_path, "kubernetes", world.options | {"start_timeout_s": 3})
    made.cluster = world.cluster
    yield made
    world.cluster.images = None
    made.close()


@pytest.mark.parametrize("wrong", ["image", "secret"])
def test_what_a_pod_never_gets_fails_it_with_the_kubelets_words(impatient, tmp_path, wrong):
    world = impatient
    given = {"image": {}, "secret": {"secrets": {"TOKEN": "no-such/token"}}}[wrong]
    world.cluster.images = set() if wrong == "image" else None
    chain = world.submit((*PROGRAM, "say", tmp_path / "said"), name=wrong, **given)
    report = world.ended(chain)
    cause, words = {
        "image": ("not_installed", 'ImagePullBackOff: Back-off pulling image "toolkit": not found'),
        "secret": ("usage", 'CreateContainerConfigError: secret "no-such" not found'),
    }[wrong]
    assert (report.state, report.cause) == (State.failed, cause)
    assert words in report.reason
    _wait_for(lambda: not world.cluster.pods(f"{chain}-01-step"), "end of the pod")
    _wait_for(lambda: world.reports(chain)[0].attempts == 1, "the keeper's word")
    assert not (tmp_path / "said").exists()


def test_a_container_killed_for_its_memory_is_not_tried_again(world, tmp_path):
    """The kernel takes the shim too, so nobody but the cluster can tell why."""
    chain, pod = counts(world, tmp_path, 999)
    world.cluster.run_out_of_memory(pod)
    report = world.ended(chain)
    assert (report.state, report.cause, report.attempts) == (State.failed, "out_of_memory", 1)
    assert report.exit_code == 137


def test_a_cluster_that_is_away_for_a_while_costs_nothing(world, tmp_path):
    chain, _ = counts(world, tmp_path, 60)
    world.cluster.broken = 503
    time.sleep(4)
    world.cluster.broken = None
    report = world.ended(chain)
    assert (report.state, report.attempts) == (State.succeeded, 1)


def test_a_submission_while_the_cluster_is_away_waits_for_it(world, tmp_path):
    world.cluster.broken = 503
    world.cluster.requests.clear()
    chain = world.submit((*PROGRAM, "say", tmp_path / "said", "once"))
    _wait_for(lambda: ("POST", JOBS) in world.cluster.requests, "a try")
    time.sleep(1)
    world.cluster.broken = None
    assert world.ended(chain).state is State.succeeded
    assert told(tmp_path / "said") == [["once"]]


def test_a_command_that_is_not_in_the_image_is_said_with_the_clusters_words(world, tmp_path):
    chain = world.submit((*PROGRAM, "say", tmp_path / "said"), argv=("/opt/no/python",))
    report = world.ended(chain)
    assert (report.state, report.cause) == (State.failed, "not_installed")
    assert "exec:" in report.reason
