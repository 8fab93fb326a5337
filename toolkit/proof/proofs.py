"""What callers use: prove an engine, or one adapter in it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ProofError
from toolkit.proof import (
    AdapterProof,
    Agreement,
    BaseProof,
    EngineProof,
    OnProof,
    ProofTarget,
    ServedAdapter,
    effect,
    identity,
    reference,
    tolerance,
    warming,
)
from toolkit.proof.adapter_files import likely_cause, unloadable
from toolkit.proof.live import Live
from toolkit.proof.parity import parity
from toolkit.proof.reference import Reference, StoredRow
from toolkit.proof.statistics import Change, difference
from toolkit.proof.warming import warm_up

__all__ = ["prove", "prove_adapter", "prove_base", "require_loadable", "warm_up"]


def prove(target: ProofTarget, on_proof: OnProof | None = None) -> EngineProof:
    """Parity, agreement and effect of everything that ``target`` serves, then warm-up (``serve.proof.warm_up``).

    Raises:
        ProofError: What is served is not what was trained; the likely cause is in the message.
        EngineError: The engine does not answer.
    """
    say = on_proof or _nobody
    base = prove_base(target, say)
    adapters = tuple(prove_adapter(target, adapter, say) for adapter in target.adapters)
    warmed = None
    if target.settings.warm_up:
        say("warming up")
        warmed = warming.warm_up(target)
    return EngineProof(target, base, adapters, warmed, Live.of(target).version())


def prove_base(target: ProofTarget, on_proof: OnProof | None = None) -> BaseProof:
    """Token parity and agreement of the base or the complete model, and the engine's own noise.

    Raises:
        ProofError: See :func:`prove`.
        EngineError: The engine does not answer.
    """
    begin = time.monotonic()
    live, stored = Live.of(target), reference.read(target.folder)
    digests = identity.folder_digests(target.folder)
    _require_unchanged(target.name, stored, digests)
    say = on_proof or _nobody
    say(f"parity of {target.name}")
    same = parity(live, target.model_id, target.name, stored.conversations if stored else ())
    rows = _usable(stored, target)
    if stored is None or not rows:
        return BaseProof(target.name, target.model_id, same, None, 0.0, 0.0, digests, _since(begin))
    say(f"agreement of {target.name}")
    (measured,) = effect.measure(live, [target.model_id], rows)
    effect.require_stable(target.name, measured.noise, tolerance.noise_bound(target))
    bound, precision = tolerance.bound(target, stored)
    agreed = effect.agreement(measured, rows, bound, precision)
    effect.require_agreement(target.name, agreed)
    return BaseProof(
        target.name,
        target.model_id,
        same,
        agreed,
        measured.noise.mean,
        measured.noise.max,
        digests,
        _since(begin),
        _shown(rows, measured),
        effect.agreement_with_full(measured, rows, bound, precision),
    )


def prove_adapter(
    target: ProofTarget, adapter: ServedAdapter, on_proof: OnProof | None = None
) -> AdapterProof:
    """Token parity, effect and agreement of one loaded adapter; ``target.adapters`` need not name it.

    Raises:
        ProofError: See :func:`prove`.
        EngineError: The engine does not answer, or does not know the adapter.
    """
    begin = time.monotonic()
    say = on_proof or _nobody
    case = _Case.read(target, adapter)
    say(f"parity of {adapter.name}")
    same = parity(case.live, adapter.model_id, adapter.name, case.conversations)
    say(f"effect of {adapter.name}")
    measured = effect.measure(case.live, [target.model_id, adapter.model_id], case.rows)
    base, own = measured
    for one, name in ((base, target.name), (own, adapter.name)):
        effect.require_stable(name, one.noise, tolerance.noise_bound(target))
    noise = max(base.noise, own.noise)
    acts = difference(own.logprobs, base.logprobs)
    effect.require_effect(adapter.name, acts, noise, adapter.path, target.folder)
    agreed, seen = None, None
    if case.stored and case.rows[0].logprobs:
        agreed, seen = case.agreement(case.stored, base, own)
    return AdapterProof(
        name=adapter.name,
        model_id=adapter.model_id,
        parity=same,
        effect_mean=round(acts.mean, 5),
        effect_max=round(acts.max, 4),
        noise_mean=round(noise.mean, 6),
        noise_max=round(noise.max, 5),
        agreement=agreed,
        scale=round(seen.scale, 4) if seen else None,
        unexplained=round(seen.unexplained, 4) if seen else None,
        digests=case.digests,
        seconds=_since(begin),
        run_id=adapter.run_id,
        source=adapter.source,
        rows=_shown(case.rows, own),
    )


def require_loadable(name: str, folder: Path, base: Path) -> None:
    """Refuse an adapter whose files no proof can speak of; preflight does so before it is loaded. Reads headers alone.

    Raises:
        ProofError: Its file is cut off, holds no LoRA, or has shapes of another base.
    """
    if cause := unloadable(folder, base):
        raise ProofError(
            f"{name}: {cause}", "copy or export the adapter again, for the base that is served"
        )


@dataclass(frozen=True)
class _Case:
    """An adapter, what is stored of it, and the tokens it is asked for."""

    target: ProofTarget
    adapter: ServedAdapter
    live: Live
    stored: Reference | None
    conversations: tuple[reference.StoredConversation, ...]
    rows: tuple[StoredRow, ...]
    digests: Mapping[str, str | None]

    @classmethod
    def read(cls, target: ProofTarget, adapter: ServedAdapter) -> _Case:
        live, of_base = Live.of(target), reference.read(target.folder)
        stored = reference.read(adapter.path)
        require_loadable(adapter.name, adapter.path, target.folder)
        digests = _adapter_digests(target, adapter)
        _require_unchanged(adapter.name, stored, digests)
        _require_base(target, adapter, stored, of_base, digests)
        rows = _usable(stored, target)
        if not rows and target.settings.agreement == "required":
            raise ProofError(
                f"{adapter.name}: {adapter.path.name} brings no logprobs of the training side, "
                "and serve.proof.agreement is 'required'"
                + (f" ({stored.not_scored})" if stored and stored.not_scored else ""),
                "export it with this version of the toolkit, or set serve.proof.agreement: if_stored",
            )
        chats = (stored or of_base).conversations if stored or of_base else ()  # type: ignore[union-attr]
        return cls(target, adapter, live, stored, chats, rows or _unscored(live, of_base), digests)

    def agreement(
        self, stored: Reference, base: effect.Measured, own: effect.Measured
    ) -> tuple[Agreement, Change]:
        bound, precision = tolerance.bound(self.target, stored, self.digests["base"])
        agreed = effect.agreement(own, self.rows, bound, precision)
        seen, error = effect.trained_change(base, own, self.rows)
        right = effect.is_trained_change(seen, error)
        if not right or agreed.mean > agreed.tolerance:
            files = likely_cause(self.adapter.path, self.target.folder)
            cause = effect.change_cause(own.logprobs, self.rows, seen, bound, files)
            if not right:
                raise effect.wrong_change(self.adapter.name, seen, cause)
            effect.require_agreement(self.adapter.name, agreed, cause)
        return agreed, seen


def _adapter_digests(target: ProofTarget, adapter: ServedAdapter) -> dict[str, str | None]:
    base = reference.read(target.folder)
    made_from = base.digests.get("made_from") if base else None
    own = identity.folder_digests(adapter.path)
    return own | {"base": identity.weights_digest(target.folder), "base_made_from": made_from}


def _require_unchanged(
    name: str, stored: Reference | None, digests: Mapping[str, str | None]
) -> None:
    """The folder is still the one whose logprobs and ids are stored in it."""
    if stored is None:
        return
    for part, what in (
        ("weights", "weights"),
        ("template", "chat template"),
        ("tokenizer", "tokenizer"),
    ):
        was, now = stored.digests.get(part), digests.get(part)
        if was != now:
            raise ProofError(
                f"{name}: the {what} in its folder changed after the export "
                f"(sha256 {_short(was)} when it was exported, {_short(now)} now)",
                "serve the folder as the toolkit wrote it, or export it again",
            )


def _require_base(
    target: ProofTarget,
    adapter: ServedAdapter,
    stored: Reference | None,
    of_base: Reference | None,
    digests: Mapping[str, str | None],
) -> None:
    """The served base is the one that the adapter was trained on, or was made from it."""
    if stored is None or stored.digests.get("base") is None:
        return
    trained_on = stored.digests["base"]
    if trained_on not in (digests["base"], digests["base_made_from"]):
        raise ProofError(
            f"{adapter.name} was trained on another base: its weights have sha256 {_short(trained_on)}, "
            f"and {target.name} has {_short(digests['base'])}"
            + (
                f", made from {_short(digests['base_made_from'])}"
                if digests["base_made_from"]
                else ""
            ),
            "serve it on the base that it was trained on, or train it on this one",
        )
    theirs = of_base.digests.get("template") if of_base else None
    if theirs and stored.digests.get("template") not in (None, theirs):
        raise ProofError(
            f"{adapter.name} was trained with another chat template than {target.name} is served with "
            f"(sha256 {_short(stored.digests['template'])} and {_short(theirs)})",
            "all adapters of one server share the base's template: serve this one alone, or merged",
        )


def _usable(stored: Reference | None, target: ProofTarget) -> tuple[StoredRow, ...]:
    """Rows that fit into the engine's context."""
    rows = stored.rows if stored else ()
    return tuple(row for row in rows if row.logprobs and len(row.ids) < target.max_length)


def _unscored(live: Live, of_base: Reference | None) -> tuple[StoredRow, ...]:
    """Tokens to ask for where the training side said nothing: enough to see whether an adapter acts."""
    if of_base and of_base.rows:
        return tuple(StoredRow(r.name, r.ids, r.start, ()) for r in of_base.rows)
    ids = tuple(live.question_ids(_QUESTION))
    return (StoredRow("unscored", (*ids, *[ids[-1]] * 8), len(ids), ()),)


_QUESTION = "Tell me in a few words what you can do for me today."


def _shown(rows: Sequence[StoredRow], measured: effect.Measured) -> tuple[Mapping[str, Any], ...]:
    """Per row, for the certificate."""
    return tuple(
        {
            "row": row.name,
            "tokens": len(row.places),
            "mean": round(difference(scored.logprobs, row.logprobs).mean, 5),
        }
        for row, scored in zip(rows, measured.scored, strict=True)
        if row.logprobs
    )


def _nobody(_said: str) -> None:
    """Told what is proven now where nobody wants to know."""


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"


def _since(begin: float) -> float:
    return round(time.monotonic() - begin, 3)
