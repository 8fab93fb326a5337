"""Manifests of a recipe's server, compared with files under tests/golden/handover. UPDATE_GOLDEN=1 writes them anew."""

import json
import os
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from toolkit.engines import Adapter, Deployment
from toolkit.engines.vllm import Vllm
from toolkit.errors import UsageError
from toolkit.handover import TARGETS, Places, locked_version, resolve
from toolkit.handover.manifest import dump
from toolkit.handover.ray import engine_kwargs
from toolkit.recipe.recipe import Recipe

GOLDEN = Path(__file__).parent.parent / "golden" / "handover"
TRAINED = {
    "name": "tickets",
    "model": {"source": "./model", "max_length": 1024},
    "data": {"sources": [{"path": "rows.jsonl"}]},
    "train": {"lora": {"rank": 24}},
    "serve": {"models": ["tuned", "merged"], "replicas": 2, "tensor_parallel": 2, "tool_parser": "hermes"},
}  # fmt: skip
BASE = {
    "name": "plain",
    "model": {"source": "./model", "max_length": 2048},
    "serve": {"dtype": "bf16", "drain_s": 90, "extra_args": ["--hf-overrides", '{"a b": 1}']},
}
PLACES = {
    "kserve": Places("pvc://models/tickets", secret="tickets-key", namespace="ml"),
    "production-stack": Places("pvc://models/tickets", secret="tickets-key", namespace="ml"),
    "ray": Places("s3://models/tickets", accelerator="H100"),
}
CASES = {"tuned": (TRAINED, "tuned"), "merged": (TRAINED, "merged"), "base": (BASE, None)}


def rendered(target: str, case: str = "tuned", **changes) -> list[dict]:
    return list(yaml.safe_load_all(text_of(target, case, **changes)))


def text_of(target: str, case: str = "tuned", places: Places | None = None) -> str:
    recipe, subject = CASES[case]
    given = resolve(Recipe.model_validate(recipe), subject, Path(), places or PLACES[target])
    return TARGETS[target]().render(given)


def kinds(target: str, kind: str) -> list[dict]:
    return [one for one in rendered(target) if one["kind"] == kind]


def engine_pod() -> dict:
    found = kinds("production-stack", "Deployment")
    return next(d for d in found if d["metadata"]["name"].endswith("-engine"))["spec"]["template"][
        "spec"
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_manifests_are_the_golden_ones(target, case):
    text = text_of(target, case)
    file = GOLDEN / f"{target}-{case}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


def test_the_cluster_gets_the_arguments_that_toolkit_serve_gives():
    """But for paths, address, and the route that loads any folder as an adapter."""
    recipe = Recipe.model_validate(TRAINED)
    root = Path("/mnt/models")
    here = Deployment(
        model=root / "model", name="tickets", max_length=1024, device="cuda",
        serve=recipe.serve.model_copy(update={"live_adapters": False}),
        adapters=(Adapter("tickets", root / "adapters/tickets", 24),),
        chat_template=root / "model/chat_template.jinja",
    )  # fmt: skip
    argv = list(Vllm().command(Path("python3"), here, 8000).argv)
    container = engine_pod()["containers"][0]
    there = [*container["command"], *container["args"]]
    assert sorted(argv) == sorted(["127.0.0.1" if word == "0.0.0.0" else word for word in there])
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in json.dumps(container["env"])


def test_kserve_says_the_rest_of_the_arguments_in_its_own_fields():
    spec = rendered("kserve")[0]["spec"]
    assert spec["model"] == {
        "uri": "pvc://models/tickets/model",
        "name": "tickets-base",
        "lora": {
            "adapters": [{"name": "tickets", "uri": "pvc://models/tickets/adapters/tickets"}],
            "maxRank": 32,
            "maxAdapters": 1,
            "maxCpuAdapters": 1,
        },
    }
    assert spec["parallelism"] == {"tensor": 2}
    env = {v["name"]: v.get("value") for v in spec["template"]["containers"][0]["env"]}
    assert "--max-model-len 1024" in env["VLLM_ADDITIONAL_ARGS"]
    for named_twice in (
        "--served-model-name",
        "--lora-modules",
        "--tensor-parallel-size",
        "--port",
    ):
        assert named_twice not in env["VLLM_ADDITIONAL_ARGS"]


def test_kserve_arguments_survive_the_shell_that_evaluates_them():
    spec = rendered("kserve", "base")[0]["spec"]
    env = {v["name"]: v.get("value") for v in spec["template"]["containers"][0]["env"]}
    assert """--hf-overrides '{"a b": 1}'""" in env["VLLM_ADDITIONAL_ARGS"]


@pytest.mark.parametrize("target", ["kserve", "production-stack"])
def test_no_pod_is_root_and_no_secret_is_written_out(target):
    objects = rendered(target)
    pods = [
        one["spec"]["template"].get("spec", one["spec"]["template"])
        for one in objects
        if one["kind"] in ("Deployment", "LLMInferenceService")
    ]
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        keys = [v for v in pod["containers"][0]["env"] if v["name"] == "VLLM_API_KEY"]
        assert keys == [
            {"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": "tickets-key", "key": "api-key"}}}
        ]  # fmt: skip


def test_every_object_is_in_the_namespace_and_labelled():
    for one in (*rendered("production-stack"), *rendered("kserve")):
        assert one["metadata"]["namespace"] == "ml"
        assert one["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "toolkit"


def test_only_the_router_reaches_the_engines():
    policy = kinds("production-stack", "NetworkPolicy")[0]["spec"]
    deployments = {
        d["metadata"]["name"]: d["spec"]["template"]["metadata"]["labels"]
        for d in kinds("production-stack", "Deployment")
    }
    allowed = policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert policy["podSelector"]["matchLabels"].items() <= deployments["tickets-engine"].items()
    assert allowed.items() <= deployments["tickets-router"].items()
    assert not allowed.items() <= deployments["tickets-engine"].items()


def test_the_engine_gets_the_time_of_the_recipe_to_start_and_to_drain():
    pod = engine_pod()
    probe = pod["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 900
    assert pod["terminationGracePeriodSeconds"] == 30 + 30


def test_ray_listens_on_loopback_and_gets_typed_keyword_arguments():
    config = rendered("ray")[0]
    assert config["http_options"]["host"] == "127.0.0.1"
    llm = config["applications"][0]["args"]["llm_configs"][0]
    assert llm["engine_kwargs"]["max_model_len"] == 1024
    assert llm["engine_kwargs"]["enable_lora"] is True
    assert llm["engine_kwargs"]["gpu_memory_utilization"] == 0.9
    assert "lora_modules" not in llm["engine_kwargs"]
    assert llm["lora_config"]["dynamic_lora_loading_path"] == "s3://models/tickets/adapters"


def test_flags_become_keyword_arguments():
    flags = (
        "--a-b",
        "1",
        "--on",
        "--no-off",
        "--many",
        "x",
        "2",
        "--json",
        '{"k": 1}',
        "--text",
        "v",
    )
    assert engine_kwargs(flags) == {
        "a_b": 1, "on": True, "off": False, "many": ["x", 2], "json": {"k": 1}, "text": "v",
    }  # fmt: skip


def test_the_image_is_that_of_the_locked_engine():
    assert f"image: vllm/vllm-openai:v{locked_version('vllm')}\n" in text_of("kserve")
    given = Places("pvc://models/tickets", image="registry.local/vllm@sha256:1")
    assert "image: registry.local/vllm@sha256:1\n" in text_of("production-stack", places=given)


WORDS = ["1e3", "0o17", "0x1F", "1_000", "y", "n", "yes", "~", "null", "-", "1:30", ".inf", "=", ""]


@pytest.mark.parametrize("word", WORDS)
def test_every_reader_takes_a_string_for_a_string(word):
    """Not only PyYAML, to which ``1e3`` is no number."""
    text = dump({"value": word, word: "key"})
    assert yaml.safe_load(text) == {"value": word, word: "key"}
    value, key = text.splitlines()[:2]
    assert value.removeprefix("value: ")[0] in "\"'"
    assert key.removeprefix("? ")[0] in "\"'"


def test_options_and_names_are_easy_to_read():
    assert dump({"args": ["--on", "-m", "a/b@sha256:1"]}) == "args:\n- --on\n- -m\n- a/b@sha256:1\n"


@pytest.mark.parametrize(
    ("target", "weights", "said", "hint"),
    [
        ("ray", "pvc://models/tickets", "Ray loads weights", "s3://BUCKET/FOLDER"),
        ("production-stack", "s3://models/tickets", "mounts a volume", "pvc://CLAIM/FOLDER"),
        ("kserve", "gs://models/tickets", "KServe loads adapters", "--model merged"),
    ],
)
def test_weights_where_a_stack_cannot_read_them_are_refused(target, weights, said, hint):
    with pytest.raises(UsageError, match=said) as refused:
        text_of(target, places=Places(weights))
    assert hint in refused.value.hint


def test_an_address_that_is_none_is_refused():
    with pytest.raises(UsageError, match="is not the address of weights") as refused:
        Places("./model")
    assert "pvc://CLAIM/FOLDER" in refused.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"serve": None}, "no serve section"),
        ({"serve": {"engine": "sglang"}}, "serves with sglang"),
        ({"serve": {"engines": ["http://10.0.0.2:8000"]}}, "knows its own engines only"),
        ({"serve": {"name": "My_Model"}}, "'My_Model' cannot name a Kubernetes object"),
    ],
)
def test_recipes_that_these_stacks_cannot_serve_are_refused(changes, said):
    recipe = Recipe.model_validate(BASE | changes)
    with pytest.raises(UsageError, match=said) as refused:
        resolve(recipe, None, Path(), PLACES["kserve"])
    assert refused.value.hint


def test_adapters_of_the_recipe_are_read_for_their_rank(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/adapter_config.json").write_text('{"r": 50}')
    recipe = Recipe.model_validate(
        BASE | {"serve": {"adapters": [{"name": "billing", "path": "./b"}]}}
    )
    given = resolve(recipe, None, tmp_path, PLACES["kserve"])
    assert given.deployment.adapters == (
        Adapter("billing", Path("/mnt/models/adapters/billing"), 50),
    )


@pytest.mark.parametrize("case", CASES)
def test_kubernetes_takes_the_objects(case):
    for one in rendered("production-stack", case):
        kubernetes_validate.validate(one, "1.34", strict=True)
