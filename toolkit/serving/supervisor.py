"""The supervisor of one server: owns its parts and the truth about them, and tells the front.

Order of start: the front (it answers 503 with the reason), engines, proofs, the router where there are several
engines, ready. Each part is kept by a thread of its own (``parts.py``); this thread waits for signals and failures.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from toolkit.engines import ENGINES, Engine, orphans, ports, records
from toolkit.errors import EngineError, NotInstalledError, ToolkitError
from toolkit.gateway.settings import GatewaySettings
from toolkit.gateway.table import Route, Table, Target
from toolkit.serving import gpus
from toolkit.serving.adapters import AdapterSet
from toolkit.serving.control import ControlServer, forget_sockets, socket_folder
from toolkit.serving.events import Events
from toolkit.serving.fleet import Adapters
from toolkit.serving.front import Front
from toolkit.serving.parts import Health, Part
from toolkit.serving.proofs import Proofs
from toolkit.serving.replicas import Replica
from toolkit.serving.router import Router
from toolkit.serving.state import AdapterSpec, Endpoint, PartState, ServerSpec, ServerStatus
from toolkit.serving.track import StartRun

JOIN_S = 30.0
"""What a part may take to end; then this process ends, and the guards do the rest."""
DRAIN_POLL_S = 0.1


class Supervisor:
    """See the module. ``Fleet`` for adapters, ``Owner`` for parts.

    Args:
        spec: The server.
        events: Where it tells what happens.
    """

    def __init__(self, spec: ServerSpec, events: Events) -> None:
        self._spec = spec
        self._events = events
        self.health = Health.of(spec.tuning)
        self._began = time.monotonic()
        self._stack = contextlib.ExitStack()
        self._state_lock = threading.RLock()
        self._change_lock = threading.RLock()
        self._wake = threading.Event()
        self._error: ToolkitError | None = None
        self._signals = 0
        self._drain_s: float | None = None
        self._draining = False
        self._ready = False
        self._told: tuple[object, ...] = ()
        self._joined: dict[int, Endpoint] = {}
        self._startup: dict[str, float] = {}
        self._engine: Engine = ENGINES[spec.section.engine]()
        self._front: Front | None = None
        self._router: Router | None = None
        self._replicas: list[Replica] = []
        self._proofs = Proofs(spec, self.model_id)
        self._adapters: Adapters = AdapterSet(self)
        self._spec = spec.with_room(self._adapters.desired())
        self._tracked = StartRun(spec)

    # -- life ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until told to stop.

        Raises:
            ToolkitError: It did not start, or cannot go on; nothing is left running.
        """
        self._catch_signals()
        try:
            with self._stack:
                self._prepare()
                self._start()
                self._serve()
                self._drain()
        finally:
            orphans.reap()
            if self._error:
                self._tracked.failed(self._error)
            self._tracked.close()
        if self._error:
            raise self._error

    def _prepare(self) -> None:
        """Sockets, ports and GPUs: what fails fast fails before anything is started."""
        orphans.reap()
        sockets = socket_folder()
        self._stack.callback(forget_sockets, sockets / "supervisor")
        section = self._spec.section
        public = self._stack.enter_context(ports.held(section.port, section.host))
        devices = self._devices()
        self._front = Front(
            self, self._front_settings(public, sockets), self._spec.place, self._table()
        )
        for index in range(section.replicas):
            port = self._stack.enter_context(ports.held(0))
            self._replicas.append(Replica(self, self._spec, index, port, devices=devices[index]))
        if section.replicas > 1:
            self._router = self._make_router()
        self._stack.callback(self._end_parts)
        control = ControlServer(sockets / "supervisor", self._handle)
        self._stack.callback(control.close)
        records.write(
            self._spec.place.parent,
            records.of(self._spec, self._front.url, str(control.path), os.getpid()),
        )
        self._stack.callback(records.remove, self._spec.place.parent, self._spec.name)
        self.event("listening", url=self._front.url, control=str(control.path))

    def _devices(self) -> list[tuple[gpus.Gpu, ...]]:
        section = self._spec.section
        if self._spec.device != "cuda":
            return [()] * section.replicas
        found = gpus.visible(gpus.query())
        return gpus.slices(found, section.replicas, gpus.gpus_per_replica(section))

    def _front_settings(self, port: int, sockets: Path) -> GatewaySettings:
        section = self._spec.section
        place = self._spec.place
        return GatewaySettings(
            name=self._spec.name,
            host=section.host,
            port=port,
            control=sockets / "front",
            front=section.front.beside(Path(self._spec.recipe_dir)),
            keys_file=Path(self._spec.keys_file) if self._spec.keys_file else None,
            access_log=place / "access.log",
            tracking_uri=(self._spec.store or {}).get("uri"),
            state_file=place / "front.state.json",
        )

    def _make_router(self) -> Router:
        if self._spec.router is None:
            raise NotInstalledError(
                "several replicas need the environment 'router', which is not built",
                "toolkit env sync router",
            )
        pair = (
            self._stack.enter_context(ports.held(0)),
            self._stack.enter_context(ports.held(0)),
        )
        interpreter = self._spec.router.interpreter()
        return Router(self, interpreter, pair, self._spec.place / "router.log")

    def _start(self) -> None:
        front = self._the_front
        front.start()
        self._await(front.ready_once)
        self._startup["front"] = self._seconds()
        for part in self._parts()[1:]:
            part.start()
        for replica in self._replicas:
            self._await(replica.ready_once)
        if self._router:
            self._await(self._router.ready_once)
        if self._over:
            return
        self._startup |= self._replicas[0].phases
        self._startup["total"] = self._seconds()
        self._ready = True
        with contextlib.suppress(EngineError):
            self.publish()
        self.event("ready", status=asdict(self.status()))
        self._tracked.ready(self._the_front.url, self._startup, self._certificate())
        self._adapters.start()

    def _serve(self) -> None:
        while not self._over:
            self._wake.wait(0.1)  # a signal handler may not set it

    def _await(self, event: threading.Event) -> None:
        while not event.wait(0.1) and not self._over:
            pass

    @property
    def _over(self) -> bool:
        return self._error is not None or self._signals > 0

    def _drain(self) -> None:
        """Take no new requests, and let the open ones finish until the deadline or a second signal."""
        if self._error is not None or not self._ready or self._drain_s == 0:
            return
        limit = self._spec.section.drain_s if self._drain_s is None else self._drain_s
        self._draining = True
        deadline = time.monotonic() + limit
        with contextlib.suppress(EngineError):
            self.publish()
            self._the_front.drain(limit)
            self.event("draining", drain_s=limit)
            while self._signals < 2 and time.monotonic() < deadline:
                if not self._the_front.status().get("open"):
                    break
                time.sleep(DRAIN_POLL_S)

    def _end_parts(self) -> None:
        """The front first, so that no request meets a dying engine."""
        self._draining = True
        self._adapters.close()
        for part in self._parts():
            part.stop()
        for part in self._parts():
            part.join(JOIN_S)

    # -- signals and orders ------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    def stop(self, drain_s: float | None = None) -> None:
        """Stop as SIGTERM does; ``drain_s`` instead of the recipe's, 0 at once."""
        if drain_s is not None:
            self._drain_s = drain_s
        self._signals += 1
        self._wake.set()

    def _handle(
        self, method: str, path: str, body: Mapping[str, Any]
    ) -> tuple[int, Mapping[str, Any]]:
        """The control socket."""
        if (method, path) == ("GET", "/status"):
            return 200, asdict(self.status())
        if (method, path) == ("GET", "/certificate"):
            return 200, self._certificate()
        if (method, path) == ("POST", "/stop"):
            self.stop(body.get("drain_s"))
            limit = self._spec.section.drain_s if self._drain_s is None else self._drain_s
            return 200, {"stopping": self._spec.name, "drain_s": limit}
        if path == "/adapters" or path.startswith("/adapters/"):
            return self._adapters.handle(method, path, body)
        return 404, {"error": {"message": f"the control socket knows no {method} {path}"}}

    # -- what parts tell ---------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """See ``parts.Owner``."""
        self.event("parts", ready=self._ready, parts=[asdict(state) for state in self._states()])
        if self._seen() != self._told:  # what /readyz and /metrics say follows the parts
            with contextlib.suppress(EngineError):
                self.publish()

    def failed(self, error: ToolkitError) -> None:
        """See ``parts.Owner``: the first error is the one that is told."""
        with self._state_lock:
            self._error = self._error or error
        self._wake.set()

    def event(self, event: str, **values: Any) -> None:
        """See ``fleet.Fleet``."""
        self._events.send(event, seconds=self._seconds(), **values)

    def desired(self) -> tuple[AdapterSpec, ...]:
        """See ``replicas.Fleet``."""
        return self._adapters.desired()

    def admit(self, replica: Replica, endpoint: Endpoint, loaded: Sequence[AdapterSpec]) -> None:
        """See ``replicas.Fleet``."""

        def proving(what: str) -> None:
            replica.become("proving", url=replica.url, detail=what)

        shown = dict(self._proofs.prove_engine(endpoint, loaded, proving))
        with self._change_lock:
            shown |= self._adapters.catch_up(endpoint, loaded)
            self._adapters.certificate(shown)
            with self._state_lock:
                self._joined[endpoint.index] = endpoint
            if self._router:
                self._router.add(endpoint.url)
            with contextlib.suppress(EngineError):
                self.publish()

    def dismiss(self, endpoint: Endpoint) -> None:
        """See ``replicas.Fleet``."""
        with self._state_lock:
            if self._joined.get(endpoint.index) != endpoint:
                return
            del self._joined[endpoint.index]
        if self._router:
            self._router.remove(endpoint.url)
        if not self._draining:
            with contextlib.suppress(EngineError):
                self.publish()

    # -- what adapters may ask ----------------------------------------------------------------------------------------

    @property
    def spec(self) -> ServerSpec:
        """See ``fleet.Fleet``."""
        return self._spec

    def endpoints(self) -> tuple[Endpoint, ...]:
        """See ``fleet.Fleet``."""
        with self._state_lock:
            return tuple(self._joined.values())

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """See ``fleet.Fleet``."""
        with self._change_lock:
            yield

    def model_id(self, adapter: AdapterSpec | None) -> str:
        """See ``fleet.Fleet``."""
        name = adapter.lora_name if adapter else None
        return self._engine.model_id(self._spec.deployment(()), name)

    def prove(self, endpoint: Endpoint, adapters: Sequence[AdapterSpec]) -> Mapping[str, Any]:
        """See ``fleet.Fleet``."""
        return self._proofs.prove_adapters(endpoint, adapters)

    def in_flight(self) -> Mapping[str, int]:
        """See ``fleet.Fleet``."""
        return dict(self._the_front.status().get("in_flight", {}))

    def publish(self) -> None:
        """See ``fleet.Fleet``."""
        if self._front is not None:
            self._told = self._seen()
            self._front.push(self._table)

    # -- what is told ------------------------------------------------------------------------------------------------

    def status(self) -> ServerStatus:
        """What ``--status`` shows."""
        table = self._table()
        return ServerStatus(
            name=self._spec.name,
            url=self._front.url if self._front else None,
            ready=table.ready,
            reason=table.reason,
            models=tuple(route.name for route in table.routes),
            engine=self._spec.section.engine,
            pid=os.getpid(),
            parts=self._states(),
            startup={phase: round(seconds, 2) for phase, seconds in self._startup.items()},
        )

    def _table(self) -> Table:
        upstream = self._upstream()
        reason = self._reason(upstream)
        routes = (self._base_route(), *self._adapters.routes())
        return Table(
            upstream=upstream,
            routes=routes if self._joined else (),
            max_length=self._spec.max_length,
            ready=reason is None,
            reason=reason,
            certificate=self._certificate() if self._ready else {},
            replicas=dict(Counter(replica.state.state for replica in self._replicas)),
            refuses=self._proofs.refuses(),
            restarts={state.name: state.restarts for state in self._states()},
        )

    def _seen(self) -> tuple[object, ...]:
        """What the front shows of the parts."""
        counted = [(state.name, state.state, state.restarts) for state in self._states()]
        return (self._reason(self._upstream()), *counted)

    def _base_route(self) -> Route:
        spec = self._spec
        kind = "base" if spec.adapters or spec.subject == "base" else "model"
        target = Target(self.model_id(None), kind, spec.model_version, run_id=spec.model_run)
        return Route(spec.base_name, (target,))

    def _upstream(self) -> str | None:
        """The router, or the one engine; ``None`` while nothing has been proven."""
        with self._state_lock:
            if not self._joined:
                return None
            return self._router.url if self._router else next(iter(self._joined.values())).url

    def _reason(self, upstream: str | None) -> str | None:
        if self._draining or self._signals:
            return "draining"
        if self._error:
            return self._error.message
        waiting = [s for s in self._states() if s.state not in ("ready", "stopped")]
        router_down = self._router is not None and self._router.state.state != "ready"
        if upstream is None or not self._ready or router_down:
            first = next((s for s in reversed(waiting) if s.name != "front"), None)
            shown = f"{first.name} {first.state}: {first.detail}" if first else "front"
            return f"starting: {shown}"
        return None

    def _certificate(self) -> Mapping[str, Any]:
        return self._proofs.certificate(self._adapters.desired(), self._startup)

    def _states(self) -> tuple[PartState, ...]:
        return tuple(part.state for part in self._parts())

    def _parts(self) -> list[Part]:
        """The front first."""
        return [part for part in (self._front, *self._replicas, self._router) if part]

    @property
    def _the_front(self) -> Front:
        if self._front is None:
            raise EngineError("the front was not started yet")
        return self._front

    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 2)
