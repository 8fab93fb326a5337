"""``serve:`` which engine serves which models, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from toolkit.recipe.base import Count, Name, Section
from toolkit.recipe.front import FrontSection
from toolkit.recipe.proof import ProofSection


class AdapterSection(Section):
    """A finished adapter that is loaded beside the one the recipe trains."""

    name: Name
    """Model name that clients ask for."""
    path: str
    """Folder of the adapter, relative to the recipe."""


class ServeSection(Section):
    """One engine process on one port. Context length comes from `model.max_length`, rank from the adapters."""

    engine: Literal["vllm", "sglang"] = "vllm"
    """`vllm` on a CPU or a GPU, `sglang` on a GPU."""
    models: tuple[str, ...] = ()
    """What to serve: `base`, `tuned` (the base with the trained adapter loaded directly),
    `merged`, or a quantized one. The first is what `toolkit serve` starts. Empty: `tuned` when the
    recipe trains, `base` otherwise."""
    name: Name | None = None
    """Model name for clients; the recipe's name unless given. The base under an adapter is `NAME-base`."""
    adapters: tuple[AdapterSection, ...] = ()
    """Finished adapters that are loaded too."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback needs the front with authentication."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type that the engine computes in; `auto` is that of the weights."""
    max_concurrent: Count = 64
    """Requests decoded together."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the GPU's memory that the engine may take."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    """Size of the KV cache on a CPU, GiB; 1 unless given."""
    eager: Literal["auto"] | bool = "auto"
    """Skip compilation and CUDA graphs: starts sooner, decodes slower. `auto` is yes on a CPU and no on a GPU."""
    tensor_parallel: Count = 1
    """GPUs that share one model."""
    start_timeout_s: Count = 900
    """Seconds until the engine must be healthy."""
    replicas: Count = 1
    """Engines that serve the same models; with more than one a router stands before them, each on GPUs of its own."""
    drain_s: Count = 30
    """Seconds that open requests get to finish when the server is told to stop."""
    front: FrontSection = FrontSection()
    """Authentication, limits, cache and logs of the public port."""
    proof: ProofSection = ProofSection()
    """What must be shown before traffic."""
    extra_args: tuple[str, ...] = ()
    """Arguments passed to the engine as they are."""
    questions: tuple[str, ...] = ()
    """Asked over the OpenAI API when `toolkit run` reaches this stage; two held-out rows unless given."""
