"""The shipped profile and templates for Kubernetes."""

from dataclasses import replace
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.unit.test_kubernetes_manifest import JOB
from toolkit import resources
from toolkit.launch import profiles
from toolkit.launch.backend import BACKENDS

TEMPLATES = resources.profiles().parent / "templates"
OBJECTS = list(yaml.safe_load_all((TEMPLATES / "kubernetes-cluster.yaml").read_text()))


def test_the_shipped_profile_makes_a_valid_job():
    section = profiles.load("kubernetes").kubernetes.model_dump(mode="json")
    job = replace(JOB, folder="/workspace/runs/jobs/t/t-01", secrets={})
    text = BACKENDS["kubernetes"](section, Path("/workspace/runs/jobs")).render(job, {})
    kubernetes_validate.validate(yaml.safe_load(text), "1.37", strict=True)


@pytest.mark.parametrize("given", OBJECTS, ids=[one["kind"] for one in OBJECTS])
def test_what_an_administrator_applies_is_valid(given):
    kubernetes_validate.validate(given, "1.37", strict=True)


def test_the_account_may_do_what_the_engine_asks_for_and_nothing_else():
    rules = next(one for one in OBJECTS if one["kind"] == "Role")["rules"]
    may = {(r, v) for rule in rules for r in rule["resources"] for v in rule["verbs"]}
    jobs = {
        (kind, verb) for kind in ("jobs", "jobsets") for verb in ("create", "get", "list", "delete")
    }
    assert may == jobs | {
        ("pods", "get"),
        ("pods", "list"),
        ("pods", "delete"),
        ("pods/log", "get"),
    }


def test_template_and_profile_agree():
    section = profiles.load("kubernetes").kubernetes
    claim, deployment = OBJECTS[0], OBJECTS[-1]["spec"]["template"]["spec"]
    assert section.volumes[0].claim == claim["metadata"]["name"]
    assert section.volumes[0].path == deployment["containers"][0]["volumeMounts"][0]["mountPath"]
    assert section.user == deployment["securityContext"]["runAsUser"]
    assert section.image == deployment["containers"][0]["image"]
