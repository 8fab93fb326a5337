"""How a server stands: what is true of it now, and what is told of that, to the front and to whoever asks."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.gateway.table import Route, Table, Target
from toolkit.serving.crew import Crew
from toolkit.serving.fleet import Adapters
from toolkit.serving.proofs import ModelId, Proofs
from toolkit.serving.state import Endpoint, ServerSpec, ServerStatus


class Standing:
    """The one place that knows why a server is ready or not. May be asked from any thread.

    Args:
        spec: The server.
        crew: Its processes.
        adapters: Its adapters.
        proofs: What was shown of its engines.
        model_id: What a request to an engine writes as ``model``.
    """

    def __init__(
        self, spec: ServerSpec, crew: Crew, adapters: Adapters, proofs: Proofs, model_id: ModelId
    ) -> None:
        self._spec = spec
        self._crew = crew
        self._adapters = adapters
        self._proofs = proofs
        self._model_id = model_id
        self._lock = threading.Lock()
        self._joined: dict[int, Endpoint] = {}
        self._told: tuple[object, ...] = ()
        self.error: ToolkitError | None = None
        """Why the server ends."""
        self.ready = False
        """Whether it was complete once."""
        self.ending = False
        """Whether it was told to stop."""
        self.startup: Mapping[str, float] = {}
        """Seconds by phase of the start."""

    def fail(self, error: ToolkitError) -> None:
        """The server ends because of ``error``; the first one is the one that is told."""
        with self._lock:
            self.error = self.error or error

    def join(self, endpoint: Endpoint) -> None:
        """An engine is proven and gets traffic."""
        with self._lock:
            self._joined[endpoint.index] = endpoint

    def leave(self, endpoint: Endpoint) -> bool:
        """An engine is gone; whether it had traffic."""
        with self._lock:
            if self._joined.get(endpoint.index) != endpoint:
                return False
            del self._joined[endpoint.index]
            return True

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Engines that get traffic."""
        with self._lock:
            return tuple(self._joined.values())

    @property
    def news(self) -> bool:
        """Whether the front was told something else last: ``/readyz`` and ``/metrics`` follow the parts."""
        return self._seen() != self._told

    def table(self) -> Table:
        """What the front is told."""
        self._told = self._seen()  # first: what changes while the table is made is news
        upstream = self._upstream()
        reason = self._reason(upstream)
        return Table(
            upstream=upstream,
            routes=self._routes(upstream),
            max_length=self._spec.max_length,
            ready=reason is None,
            reason=reason,
            certificate=self.certificate() if self.ready else {},
            replicas=dict(Counter(engine.state.state for engine in self._crew.engines)),
            refuses=self._proofs.refuses(),
            restarts={state.name: state.restarts for state in self._crew.states()},
        )

    def status(self) -> ServerStatus:
        """What ``--status`` shows; tells the front nothing."""
        upstream = self._upstream()
        reason = self._reason(upstream)
        return ServerStatus(
            name=self._spec.name,
            url=self._crew.url,
            ready=reason is None,
            reason=reason,
            models=tuple(route.name for route in self._routes(upstream)),
            engine=self._spec.section.engine,
            pid=os.getpid(),
            parts=self._crew.states(),
            in_flight=self._crew.in_flight(),
            startup={phase: round(seconds, 2) for phase, seconds in self.startup.items()},
        )

    def certificate(self) -> Mapping[str, Any]:
        """What was shown of the engines; empty before the first proof."""
        return self._proofs.certificate(self._adapters.desired(), self.startup)

    def _seen(self) -> tuple[object, ...]:
        """What the front shows of the parts."""
        counted = [(state.name, state.state, state.restarts) for state in self._crew.states()]
        return (self._reason(self._upstream()), *counted)

    def _routes(self, upstream: str | None) -> tuple[Route, ...]:
        return (self._base_route(), *self._adapters.routes()) if upstream else ()

    def _base_route(self) -> Route:
        spec = self._spec
        kind = "base" if spec.adapters or spec.subject == "base" else "model"
        target = Target(self._model_id(None), kind, spec.model_version, run_id=spec.model_run)
        return Route(spec.base_name, (target,))

    def _upstream(self) -> str | None:
        """The router, or the one engine; ``None`` while nothing has been proven."""
        joined = self.endpoints()
        if not joined:
            return None
        return self._crew.router.url if self._crew.router else joined[0].url

    def _reason(self, upstream: str | None) -> str | None:
        if self.ending:
            return "draining"
        if self.error:
            return self.error.message
        router = self._crew.router
        router_down = router is not None and router.state.state != "ready"
        if upstream is None or not self.ready or router_down:
            states = reversed(self._crew.states())
            waiting = (s for s in states if s.state not in ("ready", "stopped"))
            first = next((s for s in waiting if s.name != "front"), None)
            shown = f"{first.name} {first.state}: {first.detail}" if first else "front"
            return f"starting: {shown}"
        return None
