"""Settings that may make adapters cheaper, or starts shorter, on vLLM.

``--only vllm-variant-NAME`` starts and measures one of them, ``--only vllm-cold-NAME,vllm-start-NAME`` only
starts it, with empty and then with full caches.
"""

from __future__ import annotations

from launch import Variant

from toolkit.engines import BLOCK

TARGETS = ("--lora-target-modules", *BLOCK)
"""Where the adapters are; without the flag vLLM wraps the embedding and the logits too."""
TUNED = {"VLLM_TUNED_CONFIG_FOLDER": "{cache}/lora-kernels"}
"""Written by ``tune_lora.py`` (``--only tune``)."""
DUAL = {"VLLM_LORA_ENABLE_DUAL_STREAM": "1"}
FORK = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
"""The engine's process begins with what the server's has imported, instead of importing it again."""
GRAPHS = (
    "--cudagraph-capture-sizes",
    *map(str, (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)),
)
"""A quarter of the default's sizes: starts sooner, pads more."""

VARIANTS: dict[str, Variant] = {
    "none": Variant(),
    "tuned": Variant(env=TUNED),
    "targets": Variant(TARGETS),
    "dual": Variant(env=DUAL),
    "active": Variant(("--specialize-active-lora", *GRAPHS)),
    "few-graphs": Variant(GRAPHS),
    "fork": Variant(env=FORK),
    "fork-few-graphs": Variant(GRAPHS, FORK),
    "tuned-targets": Variant(TARGETS, TUNED),
    "tuned-targets-dual": Variant(TARGETS, TUNED | DUAL),
    "all": Variant((*TARGETS, "--specialize-active-lora", *GRAPHS), TUNED | DUAL),
}
