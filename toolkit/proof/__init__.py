"""The proofs: that what is served is what was trained.

Every exported folder carries a ``reference.json`` (:mod:`toolkit.proof.reference`): stored conversations with the token
ids of the training path, and logprobs of the training-side forward. The proofs read it and ask a live engine over
loopback, with the standard library alone; no torch, no tokenizer. What calls them::

    proof = proofs.prove(target)                   # everything: parity, agreement, effect of each adapter, warm-up
    more = proofs.prove_adapter(target, adapter)   # one adapter that was just loaded into a running engine
    certificate.certificate([proof], ...)          # the JSON of /toolkit/certificate

Each raises :class:`~toolkit.errors.ProofError` (exit code 1, the likely cause in its message) when what is served is
not what was trained, and :class:`~toolkit.errors.EngineError` when the engine does not answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit.recipe.proof import ProofSection

OnProof = Callable[[str], None]
"""Told in a few words what is proven now: ``parity of tickets``."""


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that a live engine has loaded.

    Attributes:
        name: Public name.
        model_id: What a request to the engine writes as ``model`` (``tickets@1a2b...``; SGLang ``BASE:ADAPTER``).
        path: Its folder, the one the engine loaded from.
        run_id: MLflow run that made it, where known.
        source: ``models:/name@alias``, or a folder's name, for the certificate.
    """

    name: str
    model_id: str
    path: Path
    run_id: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class ProofTarget:
    """One live engine: a base (perhaps with adapters) or a complete model.

    Attributes:
        url: Base URL of the engine itself (a replica, not the router), without ``/v1``.
        engine: ``vllm`` or ``sglang``.
        model_id: What a request writes as ``model`` to get the base or the complete model.
        name: Its public name, for messages.
        folder: Its model folder.
        max_length: Context of the engine, tokens.
        adapters: What is loaded beside it.
        settings: The recipe's ``serve.proof``.
        dtype: ``serve.dtype``: ``auto`` is the type of the weights.
        device: ``cpu`` or ``cuda``.
        run_id: MLflow run that made the model folder, where known.
        timeout_s: Longest silence of the engine per request.
    """

    url: str
    engine: str
    model_id: str
    name: str
    folder: Path
    max_length: int
    adapters: tuple[ServedAdapter, ...] = ()
    settings: ProofSection = field(default_factory=ProofSection)
    dtype: str = "auto"
    device: str = "cpu"
    run_id: str | None = None
    timeout_s: float = 300.0


@dataclass(frozen=True)
class ParityProof:
    """Token parity of one folder under one model id: every stored conversation gave the stored ids."""

    conversations: int
    tokens: int
    refused: int
    """Conversations that the template refuses, and the engine refused as well."""
    allowed: tuple[str, ...] = ()
    """Conversations that differ and may, by ``serve.proof.may_differ``."""
    too_long: tuple[str, ...] = ()
    """Conversations that are longer than the engine's context, so that it could not be asked."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Agreement:
    """How near served logprobs are to those of the training side, over all stored tokens."""

    mean: float
    """Mean absolute difference of the tokens' logprobs, nats per token."""
    max: float
    """Largest difference, nats."""
    kl: float
    """Mean KL divergence from the training side, nats per token, over shared top tokens and the rest: a lower bound."""
    tokens: int
    tolerance: float
    """What ``mean`` had to stay under."""
    precision: str
    """What the tolerance was chosen for: ``fp32``, ``bf16``, ``fp16``, ``fp8``, ``int8``, ``int4``."""


@dataclass(frozen=True)
class BaseProof:
    """What was shown of a base or a complete model."""

    name: str
    model_id: str
    parity: ParityProof | None
    agreement: Agreement | None
    """None where the folder brings no logprobs: "not checked"."""
    noise_mean: float
    """Mean difference of the same request asked again and asked in a batch, nats per token."""
    noise_max: float
    digests: Mapping[str, str | None]
    """``template``, ``tokenizer``, ``weights``."""
    seconds: float
    rows: tuple[Mapping[str, Any], ...] = ()
    """By stored row: its name, scored tokens, mean difference."""
    to_full: Agreement | None = None
    """Beside what it was made from: a quantized model beside the full one, a merged one beside base and adapter."""

    @property
    def kl_to_trained(self) -> float | None:
        """KL divergence (nats per token) of what is served from what was trained; None where nothing is stored."""
        nearest = self.to_full or self.agreement
        return nearest.kl if nearest else None


@dataclass(frozen=True)
class AdapterProof:
    """What was shown of one adapter."""

    name: str
    model_id: str
    parity: ParityProof | None
    effect_mean: float
    """Mean absolute difference to the base, nats per token."""
    effect_max: float
    noise_mean: float
    noise_max: float
    agreement: Agreement | None
    """None where there are no stored logprobs: "not checked"."""
    scale: float | None
    """Served change projected on the trained change; 1 when they are the same, 0 when the adapter does nothing."""
    unexplained: float | None
    """Share of the trained change that is not in the served one, relative to its size (root of squares)."""
    digests: Mapping[str, str | None]
    """``template``, ``tokenizer``, ``weights`` (of the adapter), ``base``."""
    seconds: float
    run_id: str | None = None
    source: str | None = None
    rows: tuple[Mapping[str, Any], ...] = ()

    @property
    def told(self) -> str:
        """In a line for people: what was shown, and what nobody could check."""
        chats = f"parity of {self.parity.conversations} conversations" if self.parity else None
        agreed = self.agreement
        parts = (
            chats or "parity not checked: neither it nor its base brings conversations",
            f"effect {self.effect_mean:.3g} nats a token",
            f"agreement with the training side {agreed.mean:.2g} nats (bound {agreed.tolerance:g})"
            if agreed
            else "agreement with the training side NOT CHECKED: it brings no stored logprobs",
        )
        return "; ".join(parts)

    @property
    def kl_to_trained(self) -> float | None:
        """KL divergence (nats per token) of what is served from what was trained; None where nothing is stored."""
        return self.agreement.kl if self.agreement else None


@dataclass(frozen=True)
class WarmUp:
    """Seconds by model id and prompt length in tokens."""

    seconds: Mapping[str, Mapping[int, float]]

    @property
    def total(self) -> float:
        """Seconds of all requests together."""
        return sum(sum(times.values()) for times in self.seconds.values())


@dataclass(frozen=True)
class EngineProof:
    """All that was shown of one engine; ``with_adapter`` follows adapters that come and go."""

    target: ProofTarget
    base: BaseProof
    adapters: tuple[AdapterProof, ...] = ()
    warm_up: WarmUp | None = None
    version: str | None = None
    """Of the engine, as it says itself."""

    def with_adapter(self, proof: AdapterProof) -> EngineProof:
        """With one more adapter, or a new version in the place of the one with its model id."""
        kept = tuple(a for a in self.adapters if a.model_id != proof.model_id)
        return replace(self, adapters=(*kept, proof))

    def without_adapter(self, model_id: str) -> EngineProof:
        """Without the adapter that the engine knows as ``model_id``."""
        kept = tuple(a for a in self.adapters if a.model_id != model_id)
        return replace(self, adapters=kept)
