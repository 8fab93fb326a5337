"""KServe's ``LLMInferenceService`` (serving.kserve.io/v1alpha2), which runs vLLM behind a gateway.

KServe's own template starts ``vllm serve /mnt/models --port 8000`` with probes, drops rights, and appends what
``VLLM_ADDITIONAL_ARGS`` says; it downloads or mounts the model and the adapters and writes ``--lora-modules`` itself.
"""

from __future__ import annotations

import shlex
from typing import Any

from toolkit.errors import UsageError
from toolkit.handover import Handover
from toolkit.handover.manifest import dump
from toolkit.handover.pods import POD_SECURITY, secret_variable

KSERVES_OWN = (
    "--model", "--host", "--port", "--served-model-name", "--shutdown-timeout", "--tensor-parallel-size",
    "--pipeline-parallel-size", "--data-parallel-size", "--enable-expert-parallel", "--enable-lora",
    "--max-lora-rank", "--max-loras", "--max-cpu-loras", "--lora-modules",
)  # fmt: skip
"""Said by fields of the object, or by KServe's template."""
MOUNTED = "/mnt/models"
ADAPTERS_FROM = ("pvc://", "s3://")


class Kserve:
    """See :class:`toolkit.handover.Target`."""

    def render(self, handover: Handover) -> str:
        """One object; the Secret that it may name is made by hand."""
        serve = handover.deployment.serve
        spec: dict[str, Any] = {
            "model": _model(handover),
            "replicas": serve.replicas,
            "parallelism": _parallelism(handover),
            "router": {"route": {}, "gateway": {}, "scheduler": {}},
            "template": _template(handover),
        }
        if not spec["parallelism"]:
            del spec["parallelism"]
        service = {
            "apiVersion": "serving.kserve.io/v1alpha2",
            "kind": "LLMInferenceService",
            "metadata": handover.metadata(),
            "spec": spec,
        }
        return dump(service)


def _model(handover: Handover) -> dict[str, Any]:
    deployment, places = handover.deployment, handover.places
    if deployment.adapters and not places.weights.startswith(ADAPTERS_FROM):
        raise UsageError(
            f"KServe loads adapters from {' and '.join(ADAPTERS_FROM)}, not from {places.weights}",
            "copy them there, or hand over the merged model: --model merged",
        )
    model: dict[str, Any] = {"uri": places.below("model"), "name": deployment.base_name}
    if deployment.adapters:
        model["lora"] = {
            "adapters": [
                {"name": adapter.name, "uri": places.below("adapters", adapter.name)}
                for adapter in deployment.adapters
            ],
            "maxRank": int(_value(handover, "--max-lora-rank")),
            "maxAdapters": deployment.slots,
            "maxCpuAdapters": int(_value(handover, "--max-cpu-loras")),
        }
    return model


def _value(handover: Handover, flag: str) -> str:
    return handover.flags[handover.flags.index(flag) + 1]


def _parallelism(handover: Handover) -> dict[str, Any]:
    serve = handover.deployment.serve
    given = {
        "tensor": serve.tensor_parallel,
        "pipeline": serve.pipeline_parallel,
        "data": serve.data_parallel,
    }
    found: dict[str, Any] = {key: count for key, count in given.items() if count > 1}
    return found | ({"expert": True} if serve.expert_parallel else {})


def _template(handover: Handover) -> dict[str, Any]:
    flags = [
        flag.replace(str(handover.deployment.model), MOUNTED)
        for flag in handover.without(*KSERVES_OWN)
    ]
    # The template evaluates the line in a shell, so it is quoted for one.
    env = {**handover.env, "VLLM_ADDITIONAL_ARGS": shlex.join(flags)}
    variables: list[dict[str, Any]] = [{"name": key, "value": text} for key, text in env.items()]
    if handover.places.secret:
        variables.append(secret_variable("VLLM_API_KEY", handover.places.secret))
    main: dict[str, Any] = {
        "name": "main",
        "image": handover.image,
        "env": variables,
        "resources": {"limits": {"nvidia.com/gpu": str(handover.gpus)}},
    }
    return {
        "automountServiceAccountToken": False,
        "securityContext": POD_SECURITY,
        "containers": [main],
    }
