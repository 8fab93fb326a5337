"""``serve:`` which engine serves which models, and how."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from toolkit.recipe.adapters import AdapterSection
from toolkit.recipe.base import Count, Name, Section
from toolkit.recipe.front import FrontSection
from toolkit.recipe.proof import ProofSection

NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


def _engine_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
        raise ValueError(f"{text!r} is not the address of an engine: write http://10.0.0.2:8000")
    return text


EngineUrl = Annotated[str, AfterValidator(_engine_url)]


class SpeculativeSection(Section):
    """Guess several tokens cheaply and check them in one step; answers stay the model's own."""

    method: Literal["ngram", "draft", "eagle", "eagle3"]
    """`ngram` copies from the prompt, `draft` asks a small model, `eagle` and `eagle3` a head trained for this one."""
    model: str | None = None
    """Folder of the draft model or head, relative to the recipe; every method but `ngram` needs it."""
    tokens: Count = 4
    """Tokens guessed per step."""

    @model_validator(mode="after")
    def _model_where_needed(self) -> Self:
        if (self.method == "ngram") is not (self.model is None):
            raise ValueError(
                "ngram takes no model" if self.model else f"{self.method} needs the key model"
            )
        return self


class MultimodalSection(Section):
    """How much besides text one request may bring; 0 refuses a kind and saves its memory."""

    images: NonNegative | None = None
    """Images per request; the engine's default unless given."""
    videos: NonNegative | None = None
    """Videos per request; the engine's default unless given."""
    audios: NonNegative | None = None
    """Audio clips per request; the engine's default unless given."""


class ServeSection(Section):
    """One engine process on one port. Context length comes from `model.max_length`, rank from the adapters."""

    engine: Literal["auto", "vllm", "sglang"] = "vllm"
    """`vllm` on a CPU or a GPU, `sglang` on a GPU, or `auto`: the one that serves this recipe on this machine;
    `toolkit plan` says which, and why."""
    models: tuple[str, ...] = ()
    """What to serve: `base`, `tuned` (the base with the trained adapter loaded directly), `merged`, a quantized one,
    or `tuned@NAME` (the adapter on the quantized base). The first is what `toolkit serve` starts. Empty: `tuned` when
    the recipe trains, `base` otherwise."""
    prefer: Literal["measured", "merged", "adapter"] = "measured"
    """Which one `toolkit serve` starts when `models` names both an adapter on a quantized base (`tuned@NAME`) and a
    quantized merged model: the one that `toolkit run` measured nearer to what was trained, or always that kind."""
    name: Name | None = None
    """Model name for clients; the recipe's name unless given. The base under an adapter is `NAME-base`."""
    adapters: tuple[AdapterSection, ...] = ()
    """Finished adapters that are loaded too."""
    live_adapters: bool = True
    """Adapters may be loaded, swapped and unloaded while the server runs."""
    adapter_slots: Count | None = None
    """Adapters that are decoded together, and room for adapters that come later; the number of adapters, and one
    more with `live_adapters`, unless given."""
    max_rank: Count | None = None
    """Largest rank that an adapter may have, also one that comes later; the largest of those that are there
    unless given."""
    adapter_targets: tuple[str, ...] = ()
    """Modules that adapters may change, also those that come later, such as `[q_proj, v_proj]`. Unless given: what
    the adapters that are there change, and with `live_adapters` all linear layers of a block (SGLang), or whatever an
    adapter brings (vLLM)."""
    watch_s: Count | None = None
    """Look every so many seconds whether an alias of `serve.adapters` moved, and follow it; `toolkit serve --watch`
    is 15."""
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
    kv_cache_gib: Positive | None = None
    """Size of the KV cache on a CPU, GiB; 1 unless given."""
    eager: Literal["auto"] | bool = "auto"
    """Skip compilation and CUDA graphs: starts sooner, decodes slower. `auto` is yes on a CPU and no on a GPU."""
    tensor_parallel: Count = 1
    """GPUs that share every layer of one model."""
    pipeline_parallel: Count = 1
    """Groups of GPUs that each hold some of the layers."""
    data_parallel: Count = 1
    """Copies of the model in one engine; for copies that fail and restart on their own take `replicas`."""
    expert_parallel: bool = False
    """Spread whole experts of a mixture-of-experts model over the GPUs, instead of cutting each."""
    prefix_caching: Literal["auto"] | bool = "auto"
    """Keep the KV cache of prompts for requests that begin alike; `auto` is the engine's choice for the model."""
    chunked_prefill: Literal["auto"] | bool = "auto"
    """Cut long prompts so that they do not hold up others; `auto` is the engine's choice."""
    max_batched_tokens: Count | None = None
    """Tokens computed in one step, which is also the size of a chunk; the engine's default unless given."""
    kv_cache_type: Literal["auto", "bf16", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """Type of the KV cache; `auto` is that of the model, `fp8` (e4m3) holds twice the tokens."""
    cpu_offload_gib: Positive | None = None
    """Weights kept in the machine's memory and copied in each step, GiB per GPU; slow."""
    kv_offload_gib: Positive | None = None
    """KV cache of earlier prompts kept in the machine's memory, GiB in all."""
    speculative: SpeculativeSection | None = None
    """Speculative decoding."""
    tool_parser: str | None = None
    """How the engine reads tool calls out of answers; names are the engine's own, such as `hermes`."""
    reasoning_parser: str | None = None
    """How the engine splits thinking from answers; names are the engine's own, such as `qwen3`."""
    structured_output: Literal["auto", "xgrammar", "outlines", "llguidance"] = "auto"
    """What keeps answers to a JSON schema or grammar; `auto` is the engine's choice."""
    multimodal: MultimodalSection = MultimodalSection()
    """Limits per request of a model that takes more than text."""
    seed: NonNegative | None = None
    """Seed of requests that bring none; the engine's default unless given."""
    log_requests: bool = False
    """The engine writes every request, with its text, into its log."""
    start_timeout_s: Count = 900
    """Seconds until the engine must be healthy."""
    replicas: Count = 1
    """Engines that serve the same models; with more than one a router stands before them, each on GPUs of its own."""
    engines: tuple[EngineUrl, ...] = ()
    """Engines that somebody else runs already, here or on other hosts (`http://10.0.0.2:8000`), with this model under
    this name: proven like replicas, balanced with them, given adapters by folders that they see too, never ended."""
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

    @property
    def needs_router(self) -> bool:
        """Whether several engines stand side by side."""
        return self.replicas + len(self.engines) > 1

    @property
    def draft(self) -> str | None:
        """Folder of the model that guesses, as the recipe writes it."""
        return self.speculative.model if self.speculative else None
