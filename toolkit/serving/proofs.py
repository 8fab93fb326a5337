"""What was shown of each engine of a server, and the certificate that says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from toolkit.proof import AdapterProof, EngineProof, OnProof, ProofTarget, ServedAdapter
from toolkit.serving.state import AdapterSpec, Endpoint, ServerSpec

NO_ANSWER = frozenset(
    {"models", "prefer", "name", "adapters", "live_adapters", "adapter_slots", "adapter_targets", "max_rank",
     "watch_s", "host", "port", "max_concurrent", "memory_fraction", "kv_cache_gib", "start_timeout_s", "replicas",
     "engines", "drain_s", "front", "proof", "log_requests", "questions", "cpu_offload_gib", "kv_offload_gib"}
)  # fmt: skip
"""Keys of ``serve`` that change no answer: where, how many, how long, and for whom. A new key is taken to change it."""

ModelId = Callable[[AdapterSpec | None], str]


class Proofs:
    """The proofs of one server, by replica.

    Args:
        spec: The server.
        model_id: What a request to an engine writes as ``model``.
    """

    def __init__(self, spec: ServerSpec, model_id: ModelId) -> None:
        self._spec = spec
        self._model_id = model_id
        self._shown: dict[int, EngineProof] = {}
        self._lock = threading.Lock()
        self._made: tuple[Any, Mapping[str, Any]] = (None, {})

    def prove_engine(
        self, endpoint: Endpoint, loaded: Sequence[AdapterSpec], on_proof: OnProof
    ) -> Mapping[str, Any]:
        """Prove and warm up all that an engine was started with; the proofs of adapters by ``lora_name``.

        Raises:
            ProofError: What is served is not what was trained.
            EngineError: The engine does not answer.
        """
        from toolkit.proof.proofs import prove

        shown = prove(self._target(endpoint, loaded), on_proof)
        with self._lock:
            self._shown[endpoint.index] = shown
        return {a.lora_name: p for a, p in zip(loaded, shown.adapters, strict=True)}

    def prove_adapters(
        self, endpoint: Endpoint, adapters: Sequence[AdapterSpec]
    ) -> Mapping[str, Any]:
        """Prove adapters that came while the engine ran; see :meth:`prove_engine`."""
        from toolkit.proof.proofs import prove_adapter, warm_up

        target = self._target(endpoint, ())
        served = tuple(map(self._served, adapters))
        shown = [prove_adapter(target, adapter) for adapter in served]
        if target.settings.warm_up:
            warm_up(target, served)
        with self._lock:
            for proof in shown:
                self._shown[endpoint.index] = self._shown[endpoint.index].with_adapter(proof)
        return {a.lora_name: p for a, p in zip(adapters, shown, strict=True)}

    def certificate(
        self, desired: Sequence[AdapterSpec], phases: Mapping[str, float]
    ) -> Mapping[str, Any]:
        """The JSON of ``/toolkit/certificate``; empty before the first proof."""
        from toolkit.proof.certificate import certificate

        with self._lock:
            shown = [self._shown[index] for index in sorted(self._shown)]
            made_of = (tuple(shown), tuple(desired), tuple(phases.items()))
            if shown and self._made[0] != made_of:
                kept = {self._model_id(adapter) for adapter in desired}
                made = certificate(
                    [_only(proof, kept) for proof in shown],
                    name=self._spec.name,
                    phases=dict(phases),
                    fingerprints={"model": self._spec.model_version}
                    | {f"adapter {a.lora_name}": a.version for a in desired},
                    options=_options(self._spec),
                )
                self._made = (made_of, made)
            return self._made[1]

    def refuses(self) -> Mapping[str, str]:
        """What these engines cannot answer, with the reason; nothing before one was proven."""
        from toolkit.preflight.requests import refused

        spec, section = self._spec, self._spec.section
        lora = bool(spec.adapters) or section.adapter_slots is not None
        with self._lock:
            versions = {proof.version or "" for proof in self._shown.values()}
        found: dict[str, str] = {}
        for version in versions:
            found |= refused(section.engine, version, spec.device, lora=lora)
        return found

    def _target(self, endpoint: Endpoint, loaded: Sequence[AdapterSpec]) -> ProofTarget:
        spec, section = self._spec, self._spec.section
        return ProofTarget(
            url=endpoint.url,
            engine=section.engine,
            model_id=self._model_id(None),
            name=spec.base_name,
            folder=Path(spec.model),
            max_length=spec.max_length,
            adapters=tuple(map(self._served, loaded)),
            settings=section.proof,
            dtype=section.dtype,
            device=spec.device,
            run_id=spec.model_run,
        )

    def _served(self, adapter: AdapterSpec) -> ServedAdapter:
        return ServedAdapter(
            adapter.name,
            self._model_id(adapter),
            Path(adapter.path),
            adapter.run_id,
            adapter.source,
        )


def told(shown: Mapping[str, Any]) -> dict[str, str]:
    """What people are told of proofs of adapters, by ``lora_name``."""
    return {name: proof.told for name, proof in shown.items() if isinstance(proof, AdapterProof)}


def _options(spec: ServerSpec) -> Mapping[str, Any]:
    chosen = {key: value for key, value in spec.serve.items() if key not in NO_ANSWER}
    return {**chosen, "lock": spec.engine_digest}


def _only(proof: EngineProof, kept: AbstractSet[str]) -> EngineProof:
    """Without adapters that went meanwhile."""
    for gone in [a.model_id for a in proof.adapters if a.model_id not in kept]:
        proof = proof.without_adapter(gone)
    return proof
