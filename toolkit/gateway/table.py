"""What the front knows of the models behind it. The supervisor writes it, the front only reads it.

The supervisor sends a whole :class:`Table` to ``PUT /table`` on the front's Unix socket whenever anything changes; the
front swaps it in one assignment, so a request sees one table from its first byte to its last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

STATES = ("starting", "proving", "ready", "waiting", "stopped")
"""What an engine can be in; ``waiting`` is for its next start."""

PROMPT_LOGPROBS = "prompt_logprobs"
"""A name in :attr:`Table.refuses`: logprobs of the tokens of the prompt."""


@dataclass(frozen=True)
class Target:
    """One thing that can answer for a public name.

    Attributes:
        model_id: What a request to the engine writes as ``model``.
        kind: ``base``, ``adapter``, or ``model`` (a complete one: merged, quantized).
        version: Identity of the weights: the first 16 hex digits of the adapter's (or model's) digest.
        label: Name of the variant in metrics and in the canary header: ``stable``, ``canary``, or what the user chose.
        weight: Share of requests without a canary header, relative to the other targets of the route.
        run_id: MLflow run that made the weights, where known.
        source: Where it came from: ``models:/name@alias``, or a folder's name.
    """

    model_id: str
    kind: str
    version: str
    label: str = "stable"
    weight: float = 1.0
    run_id: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Route:
    """A public model name and what answers for it."""

    name: str
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Table:
    """All that decides where a request goes.

    Attributes:
        upstream: URL of the one engine or of the router, without ``/v1``; ``None`` while nothing can answer.
        routes: Public names.
        max_length: Context of the engine, tokens.
        ready: What ``/readyz`` says.
        reason: Why it is not ready: ``starting: loading weights``, ``draining``, ``proof failed: ...``.
        certificate: The JSON of ``/toolkit/certificate``; empty until the proofs are done.
        replicas: How many engines are in each of :data:`STATES`.
        restarts: How often each part was started again: ``front``, ``replica-0``, ``router``.
        refuses: What the engine cannot answer (:data:`PROMPT_LOGPROBS`), and why, by the table of
            :mod:`toolkit.preflight.requests`.
    """

    upstream: str | None
    routes: tuple[Route, ...]
    max_length: int
    ready: bool
    reason: str | None = None
    certificate: Mapping[str, Any] = field(default_factory=dict)
    replicas: Mapping[str, int] = field(default_factory=dict)
    restarts: Mapping[str, int] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)

    def route(self, name: str) -> Route | None:
        """The route of a public name."""
        return next((route for route in self.routes if route.name == name), None)

    def to_json(self) -> str:
        """The body of ``PUT /table``."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Table:
        """Read what :meth:`to_json` wrote."""
        values = json.loads(text)
        routes = tuple(
            Route(r["name"], tuple(Target(**t) for t in r["targets"])) for r in values["routes"]
        )
        return cls(**values | {"routes": routes})
