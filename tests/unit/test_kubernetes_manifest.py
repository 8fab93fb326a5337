"""What Kubernetes is sent, compared with files under tests/golden/jobs. UPDATE_GOLDEN=1 writes them anew."""

import os
from dataclasses import replace
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.fake_kubernetes import LABEL, NAME, expanded
from toolkit.errors import UsageError
from toolkit.launch.kubernetes import names
from toolkit.launch.kubernetes.backend import Kubernetes
from toolkit.launch.kubernetes.render import manifest
from toolkit.launch.kubernetes.section import KubernetesSection
from toolkit.launch.spec import JobSpec, Resources

GOLDEN = Path(__file__).parent.parent / "golden" / "jobs"
JOB = JobSpec(
    id="tickets-3fa2c1d4-04-train",
    chain="tickets-3fa2c1d4",
    step="train",
    stage="train",
    folder="/team/runs/jobs/tickets-3fa2c1d4/tickets-3fa2c1d4-04-train",
    after=("tickets-3fa2c1d4-03-data",),
    argv=("/opt/venv/bin/python", "-P", "-m", "toolkit.launch.shim", "/team/runs/jobs/a b/$(HOME)"),
    env={"TOOLKIT_CACHE": "/team/cache", "EMPTY": "", "LOOKS_LIKE_A_NUMBER": "1e3", "NO": "n"},
    secrets={"HF_TOKEN": "hugging-face/token"},
    resources=Resources(gpus=2, cpus=16, memory_gib=120, nodes=1, time_limit_s=86400),
)
CLUSTER = KubernetesSection.model_validate(
    {
        "namespace": "ml",
        "image": "registry.example/toolkit@sha256:0123456789abcdef",
        "volumes": [
            {"path": "/team", "claim": "team"},
            {"path": "/data", "nfs": "files:/export/data", "read_only": True},
            {"path": "/scratch", "empty_gib": 200},
            {"path": "/etc/site", "config_map": "site", "sub_path": "site.yaml"},
        ],
        "pull_policy": "IfNotPresent",
        "pull_secrets": ["registry"],
        "queue": "gpus",
        "priority_class": "low",
        "runtime_class": "nvidia",
        "service_account": "jobs",
        "node_selector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "labels": {"cost-center": "1234"},
        "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
        "user": 12345,
    }
)
PLAIN = KubernetesSection(image="toolkit", volumes=({"path": "/team", "claim": "team"},))
CASES = {
    "job": (JOB, CLUSTER),
    "plain": (replace(JOB, resources=Resources(), secrets={}, env={}), PLAIN),
    "jobset": (replace(JOB, resources=Resources(8, 64, 900, 4, None)), CLUSTER),
}


def text_of(case: str) -> str:
    job, section = CASES[case]
    return Kubernetes(section.model_dump(mode="json"), Path()).render(job, {})


def pod_of(case: str) -> dict:
    return jobs_of(case)["template"]["spec"]


def jobs_of(case: str) -> dict:
    spec = yaml.safe_load(text_of(case))["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"] if "replicatedJobs" in spec else spec


def env_of(pod: dict) -> dict:
    return {
        one["name"]: one.get("value", one.get("valueFrom")) for one in pod["containers"][0]["env"]
    }


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_the_golden_ones(case):
    text = text_of(case)
    file = GOLDEN / f"kubernetes-{case}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("case", CASES)
def test_manifests_are_valid_and_have_no_field_that_kubernetes_does_not_know(case, version):
    job = {"apiVersion": "batch/v1", "kind": "Job", "spec": jobs_of(case)}
    kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_no_pod_is_root_writes_its_image_or_gets_a_token(case):
    pod = pod_of(case)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == CASES[case][1].user > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not [one for one in pod["volumes"] if "hostPath" in one]


def test_a_pod_has_its_grace_and_time_to_write_down_how_it_ended():
    assert pod_of("job")["terminationGracePeriodSeconds"] == JOB.grace_s + 15


def test_nothing_is_started_again_behind_the_keepers_back():
    assert jobs_of("job")["backoffLimit"] == 0
    assert yaml.safe_load(text_of("jobset"))["spec"]["failurePolicy"] == {"maxRestarts": 0}
    assert {rule["action"] for rule in jobs_of("job")["podFailurePolicy"]["rules"]} == {"FailJob"}


def test_several_nodes_meet_at_the_first_of_them():
    whole = yaml.safe_load(text_of("jobset"))
    name, job = whole["metadata"]["name"], jobs_of("jobset")
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 4, 4)
    assert whole["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": name}
    env = env_of(pod_of("jobset"))
    assert env["TOOLKIT_RENDEZVOUS"] == f"{name}-n-0-0.{name}:29500"
    assert "completion-index" in env["TOOLKIT_NODE"]["fieldRef"]["fieldPath"]


def test_secrets_are_named_and_never_written():
    env = env_of(pod_of("job"))
    assert env["HF_TOKEN"] == {"secretKeyRef": {"name": "hugging-face", "key": "token"}}


@pytest.mark.parametrize(
    "place", ["hugging-face", "env:HF_TOKEN", "file:/home/me/token", "a/", "/b"]
)
def test_a_secret_without_its_key_is_refused(place):
    with pytest.raises(UsageError, match="which names no key of a Secret") as no:
        manifest(replace(JOB, secrets={"HF_TOKEN": place}), CLUSTER)
    assert no.value.hint == "write secrets: {HF_TOKEN: NAME-OF-SECRET/KEY}"


def test_a_profile_without_an_image_is_refused():
    with pytest.raises(UsageError, match="names no image") as no:
        manifest(JOB, KubernetesSection(volumes=CLUSTER.volumes))
    assert "kubernetes.image" in no.value.hint


def test_a_stage_may_have_an_image_of_its_own():
    section = PLAIN.model_copy(update={"images": {"train": "trainer"}})
    assert "image: trainer\n" in manifest(JOB, section)
    assert "image: toolkit\n" in manifest(replace(JOB, stage="serve"), section)


@pytest.mark.parametrize(
    ("volumes", "known"),
    [
        ((), "none"),
        (({"path": "/team", "claim": "team", "read_only": True},), "none"),
        (({"path": "/team", "empty_gib": 1}, {"path": "/other", "claim": "c"}), "/other"),
    ],
)
def test_a_workspace_that_no_volume_holds_is_refused(volumes, known):
    with pytest.raises(UsageError, match="no volume of the profile holds the workspace") as no:
        manifest(JOB, KubernetesSection(image="toolkit", volumes=volumes))
    assert f"(volumes that last: {known})" in no.value.message


def test_a_volume_is_one_thing():
    with pytest.raises(ValueError, match="claim and empty_gib is given"):
        KubernetesSection(volumes=({"path": "/a", "claim": "c", "empty_gib": 1},))
    with pytest.raises(ValueError, match="none is given"):
        KubernetesSection(volumes=({"path": "/a"},))


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=40)
NASTY = TEXTS | st.sampled_from(
    ["$(HOME)", "$$(A)", "$", "1e3", "0o7", "y", "~", "=", "#", "a: b", "\r\n", "%", "'", '"']
)


@given(words=st.lists(NASTY, min_size=1), value=NASTY)
def test_arguments_and_variables_arrive_unchanged(words, value):
    job = replace(JOB, argv=tuple(words), env={"A": value, "HOME": "/home"}, secrets={})
    pod = yaml.safe_load(manifest(job, PLAIN))["spec"]["template"]["spec"]
    given_env = {k: v for k, v in env_of(pod).items() if isinstance(v, str)}
    there = {key: expanded(text, given_env) for key, text in given_env.items()}
    assert there["A"] == value
    assert [expanded(word, there) for word in pod["containers"][0]["command"]] == words


@given(
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", fullmatch=True),
    st.integers(1, 99),
    st.booleans(),
)
def test_every_job_has_a_name_that_kubernetes_takes(job_id, number, several):
    name = names.object_name(job_id, number, several=several)
    assert NAME.fullmatch(name)
    assert LABEL.fullmatch(name)
    if several:
        assert name[0].isalpha()
        assert len(f"{name}-n-0-999-abcde") <= 63
    elif len(job_id) <= 52:
        assert name.startswith(job_id)


def test_long_ids_of_several_nodes_stay_apart():
    long = "a" * 51
    found = {names.object_name(long + end, n, several=True) for end in "bc" for n in (1, 2)}
    assert len(found) == 4


@given(st.text(max_size=80))
def test_a_label_is_one_that_kubernetes_takes(text):
    assert LABEL.fullmatch(names.label(text))
