"""What adapters and proofs may ask of a running server: the seam between the supervisor and what plugs into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from toolkit.gateway.table import Route
from toolkit.serving.state import AdapterSpec, Endpoint, ServerSpec


class Fleet(Protocol):
    """All engines of one server. Every method may be called from any thread."""

    @property
    def spec(self) -> ServerSpec:
        """What the server was started with."""
        ...

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Engines that get traffic now."""
        ...

    def changing(self) -> AbstractContextManager[None]:
        """Hold off restarts of engines from joining while adapters change: all replicas or none."""
        ...

    def model_id(self, adapter: AdapterSpec | None) -> str:
        """What a request to an engine writes as ``model`` for an adapter, or for the base."""
        ...

    def prove(self, endpoint: Endpoint, adapters: Sequence[AdapterSpec]) -> Mapping[str, Any]:
        """Prove (and warm up) adapters that are loaded in one engine; the part of the certificate, by ``lora_name``.

        Raises:
            ProofError: What is served is not what was trained.
            EngineError: The engine does not answer.
        """
        ...

    def in_flight(self) -> Mapping[str, int]:
        """Open requests by ``model_id``, as the front counts them; a model without any may be absent."""
        ...

    def publish(self) -> None:
        """Send the front a table with what ``Adapters.routes`` says now; returns when the front took it.

        Raises:
            EngineError: The front does not answer; it gets the newest table when it is back.
        """
        ...

    def event(self, event: str, **values: Any) -> None:
        """Tell whoever watches the server (events file, terminal): ``note``, ``swap``, ``refused``."""
        ...


class Adapters(Protocol):
    """The desired adapters of one server: what ``toolkit/serving/adapters.py`` is to the supervisor."""

    def desired(self) -> tuple[AdapterSpec, ...]:
        """Every version that a (re)starting engine must have."""
        ...

    def routes(self) -> tuple[Route, ...]:
        """Public names of adapters with their targets; the supervisor adds the base's."""
        ...

    def certificate(self, proven: Mapping[str, Any]) -> None:
        """Take the proofs of a start (by ``lora_name``)."""
        ...

    def catch_up(self, endpoint: Endpoint, loaded: Sequence[AdapterSpec]) -> Mapping[str, Any]:
        """Bring an engine that was started with ``loaded`` to what is desired now, and prove what was added.

        Called under ``Fleet.changing`` before the engine gets traffic.
        """
        ...

    def handle(
        self, method: str, path: str, body: Mapping[str, Any]
    ) -> tuple[int, Mapping[str, Any]]:
        """Answer a request for ``/adapters...`` on the control socket: status and JSON. ToolkitErrors may pass."""
        ...

    def start(self) -> None:
        """The server is ready: begin to watch aliases."""
        ...

    def close(self) -> None:
        """The server stops: end all threads within a second."""
        ...


MakeAdapters = Callable[[Fleet], Adapters]
"""``AdapterSet(fleet)``; desired state of an earlier life is read from ``fleet.spec.place``."""
