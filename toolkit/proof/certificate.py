"""The certificate: what was proven of a server, as JSON. Stored with the run and served at ``/toolkit/certificate``."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from toolkit import __version__, digests
from toolkit.proof import AdapterProof, BaseProof, EngineProof, reference

SCHEMA = 1
NOT_CHECKED = "not checked"


def certificate(
    proofs: Sequence[EngineProof],
    *,
    name: str,
    phases: Mapping[str, float] | None = None,
    fingerprints: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Put the proofs of a server's replicas (at least one) into a certificate.

    Args:
        proofs: One per replica, in order.
        name: The server's name.
        phases: Seconds of each phase of start-up.
        fingerprints: Of the artifacts that are served, by role (``model``, ``adapter``).
        options: What else decides an answer: how the engine was started.

    Returns:
        ``schema``; ``id``, the sha256 of ``subject``; ``answers``, a sha256 that servers share whose base answers a
        request alike; ``subject``, which is equal whenever the same weights, template, tokenizer, engine and
        versions are proven in the same way; ``time`` (UTC); ``name``; ``proofs``, one entry per
        replica; ``phases`` (seconds); ``machine``.
    """
    first = proofs[0]
    subject = _subject(first, fingerprints or {})
    return {
        "schema": SCHEMA,
        "id": digests.of_json(subject),
        "answers": digests.of_json(_answering(first, options or {})),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "name": name,
        "subject": subject,
        "proofs": [_replica(proof) for proof in proofs],
        "phases": {phase: round(seconds, 2) for phase, seconds in (phases or {}).items()},
        "machine": machine(),
    }


def metrics(proof: EngineProof) -> dict[str, float]:
    """The proofs as metrics of a run: worst values over the base and all adapters.

    ``kl_to_trained`` is that of the subject (the first adapter, or the only model): how far what is served is from
    what was trained, which is what decides between two ways to serve (:mod:`toolkit.proof.choice`).
    """
    every: list[BaseProof | AdapterProof] = [proof.base, *proof.adapters]
    found = [p.agreement for p in every if p.agreement]
    chats = [p.parity for p in every if p.parity]
    numbers = {
        "proof_parity_conversations": float(sum(p.conversations for p in chats)),
        "proof_seconds": sum(p.seconds for p in every),
    }
    if found:
        numbers["proof_difference"] = max(a.mean for a in found)
        numbers["proof_max_difference"] = max(a.max for a in found)
        numbers["proof_kl"] = max(a.kl for a in found)
    subject = proof.adapters[0] if proof.adapters else proof.base
    if subject.kl_to_trained is not None:
        numbers["kl_to_trained"] = subject.kl_to_trained
    if proof.adapters:
        numbers["proof_effect"] = min(a.effect_mean for a in proof.adapters)
    if proof.warm_up:
        numbers["warm_up_seconds"] = round(proof.warm_up.total, 3)
    return numbers


def _subject(proof: EngineProof, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What the id is of: no times, no measured numbers, no paths."""
    target, stored = proof.target, reference.read(proof.target.folder)
    return {
        "model": {"name": target.name, **proof.base.digests, "run_id": target.run_id},
        "adapters": sorted(
            (
                {"name": a.name, **a.digests, "run_id": a.run_id, "source": a.source}
                for a in proof.adapters
            ),
            key=lambda adapter: (adapter["name"] or "", adapter["weights"] or ""),
        ),
        "engine": {"name": target.engine, "version": proof.version},
        "max_length": target.max_length,
        "dtype": target.dtype,
        "tolerance": target.settings.tolerance,
        "may_differ": list(target.settings.may_differ),
        "training_side": dict(stored.versions) if stored else None,
        "fingerprints": dict(sorted(fingerprints.items())),
        "toolkit": {"version": __version__, "commit": commit()},
    }


def _answering(proof: EngineProof, options: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the base's answer to a request, wherever and under whatever name it is served.

    Adapters are not in it: a request names its own, by the digest of its folder.
    """
    defaults = proof.target.folder / "generation_config.json"
    return {
        "model": dict(proof.base.digests),
        "defaults": digests.of_file(defaults) if defaults.is_file() else None,
        "engine": [proof.target.engine, proof.version],
        "max_length": proof.target.max_length,
        "dtype": proof.target.dtype,
        "device": proof.target.device,
        "options": dict(options),
        "toolkit": __version__,
    }


def _replica(proof: EngineProof) -> dict[str, Any]:
    warmed = proof.warm_up
    return {
        "base": _shown(proof.base),
        "adapters": [_shown(adapter) for adapter in proof.adapters],
        "warm_up": {m: {str(n): s for n, s in times.items()} for m, times in warmed.seconds.items()}
        if warmed
        else None,
    }


def _shown(proof: BaseProof | AdapterProof) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(proof)))
    for part in ("agreement", "parity"):
        values[part] = values[part] or NOT_CHECKED
    return values


@cache
def machine() -> dict[str, str]:
    """GPU and driver, where there are some."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    first = said.strip().splitlines()[:1]
    gpu, _, driver = first[0].partition(", ") if first else ("", "", "")
    return {"gpu": gpu, "driver": driver} if gpu else {}


@cache
def commit() -> str | None:
    """Commit of the toolkit's checkout; None for an installed one."""
    head = Path(__file__).parents[2] / ".git"
    if not head.exists():
        return None
    command = ["git", "-C", str(head.parent), "rev-parse", "HEAD"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.strip()
