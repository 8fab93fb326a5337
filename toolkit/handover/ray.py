"""A Ray Serve config for ``serve deploy``: ``ray.serve.llm:build_openai_app`` with one LLM.

Ray names an adapter ``BASE:ADAPTER`` and loads it from ``.../adapters/ADAPTER`` when it is first asked for; the
toolkit and KServe call it by its name alone.
"""

from __future__ import annotations

import json
from typing import Any

from toolkit.errors import UsageError
from toolkit.handover import Handover
from toolkit.handover.manifest import dump

RAYS_OWN = (
    "--model", "--host", "--port", "--served-model-name", "--shutdown-timeout", "--lora-modules",
    "--chat-template", "--generation-config",
)  # fmt: skip
"""Said by other fields, or read from the model's folder, where the template travels."""


class Ray:
    """See :class:`toolkit.handover.Target`."""

    def render(self, handover: Handover) -> str:
        """One file for ``serve deploy``."""
        serve, places = handover.deployment.serve, handover.places
        llm: dict[str, Any] = {
            "model_loading_config": _loading(handover),
            "engine_kwargs": engine_kwargs(handover.without(*RAYS_OWN)),
            "runtime_env": {"env_vars": _environment(handover)},
            "deployment_config": {
                "num_replicas": serve.replicas,
                "max_ongoing_requests": 2 * serve.max_concurrent,
                "graceful_shutdown_timeout_s": serve.drain_s,
            },
        }
        if places.accelerator:
            llm["accelerator_type"] = places.accelerator
        if handover.deployment.adapters:
            llm["lora_config"] = {
                "dynamic_lora_loading_path": places.below("adapters"),
                "max_num_adapters_per_replica": handover.deployment.slots,
            }
        application = {
            "name": handover.name,
            "route_prefix": "/",
            "import_path": "ray.serve.llm:build_openai_app",
            "args": {"llm_configs": [llm]},
        }
        # Ray's proxy has no authentication: it stays on loopback until something with one stands before it.
        http = {"host": "127.0.0.1", "port": serve.port or 8000}
        return dump(
            {
                "proxy_location": "HeadOnly",
                "http_options": http,
                "applications": [application],
            }
        )


def _loading(handover: Handover) -> dict[str, Any]:
    source = handover.places.below("model")
    if source.startswith("pvc:"):
        raise UsageError(
            f"Ray loads weights and adapters from object storage, not from {handover.places.weights}",
            "copy them to a bucket and write --weights s3://BUCKET/FOLDER",
        )
    return {
        "model_id": handover.deployment.base_name,
        "model_source": {"bucket_uri": source},
    }


def _environment(handover: Handover) -> dict[str, str]:
    """Without those that make a start refuse to read from a bucket, and those for another way of starting."""
    return {
        key: value
        for key, value in handover.env.items()
        if key not in ("HF_HUB_OFFLINE", "PYTHONSAFEPATH")
    }


def engine_kwargs(flags: tuple[str, ...]) -> dict[str, Any]:
    """Flags of vLLM as the keyword arguments that they stand for."""
    found: dict[str, Any] = {}
    key = ""
    for word in flags:
        if word.startswith("--"):
            key = word.removeprefix("--").replace("-", "_")
            off = key.startswith("no_")
            key = key.removeprefix("no_")
            found[key] = not off
        elif found[key] is True:
            found[key] = typed(word)
        else:
            kept = found[key] if isinstance(found[key], list) else [found[key]]
            found[key] = [*kept, typed(word)]
    return found


def typed(word: str) -> Any:
    """A number or a JSON value where the text is one."""
    try:
        return json.loads(word)
    except ValueError:
        return word
