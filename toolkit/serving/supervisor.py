"""The supervisor of one server: starts its crew, keeps it, answers its control socket, and ends it.

What is run is ``crew.py``; what is true of it and is told, to the front too, is ``standing.py``.

Order of start: the front (it answers 503 with the reason), engines, proofs, the router where there are several
engines, ready. Each part is kept by a thread of its own (``parts.py``); this thread waits for signals and failures.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any

from toolkit.engines import ENGINES, Engine, orphans, records
from toolkit.errors import EngineError, ToolkitError
from toolkit.serving.adapters import AdapterSet
from toolkit.serving.control import ControlServer, forget_sockets, socket_folder
from toolkit.serving.crew import Crew
from toolkit.serving.events import Events
from toolkit.serving.fleet import Adapters
from toolkit.serving.parts import Health, Part
from toolkit.serving.proofs import Proofs, told
from toolkit.serving.replicas import Proving
from toolkit.serving.standing import Standing
from toolkit.serving.state import AdapterSpec, Endpoint, ServerSpec
from toolkit.serving.track import StartRun

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
        self._change_lock = threading.RLock()
        self._wake = threading.Event()
        self._signals = 0
        self._drain_s: float | None = None
        self._engine: Engine = ENGINES[spec.section.engine]()
        self._proofs = Proofs(spec, self.model_id)
        self._adapters: Adapters = AdapterSet(self)
        self._spec = spec = spec.with_room(self._adapters.desired())
        self._crew = Crew(spec)
        self._standing = Standing(spec, self._crew, self._adapters, self._proofs, self.model_id)
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
            error = self._standing.error
            if error:
                self._tracked.failed(error)
            self._tracked.close()
        if error:
            raise error

    def _prepare(self) -> None:
        """Sockets, ports and GPUs: what fails fast fails before anything is started."""
        orphans.reap()
        sockets = socket_folder()
        self._stack.callback(forget_sockets, sockets / "supervisor")
        self._crew.make(self, self._standing.table(), sockets, self._stack)
        self._stack.callback(self._end)
        control = ControlServer(sockets / "supervisor", self._handle)
        self._stack.callback(control.close)
        url = self._crew.front.url
        record = records.of(self._spec, url, str(control.path), os.getpid())
        records.write(self._spec.place.parent, record)
        self._stack.callback(records.remove, self._spec.place.parent, self._spec.name)
        self.event("listening", url=url, control=str(control.path))

    def _start(self) -> None:
        crew, standing = self._crew, self._standing
        crew.front.start()
        self._await(crew.front)
        standing.startup = {"front": self._seconds()}
        for part in crew.parts[1:]:
            part.start()
        for part in crew.parts[1:]:
            self._await(part)
        if self._over:
            return
        phases = {**standing.startup, **crew.replicas[0].phases, "total": self._seconds()}
        standing.startup = phases
        standing.ready = True
        with contextlib.suppress(EngineError):
            self.publish()
        self.event("ready", status=asdict(standing.status()))
        self._tracked.ready(crew.front.url, standing.startup, standing.certificate())
        self._adapters.start()

    def _serve(self) -> None:
        while not self._over:
            self._wake.wait(0.1)  # a signal handler may not set it

    def _await(self, part: Part) -> None:
        while not part.ready_once.wait(0.1) and not self._over:
            pass

    @property
    def _over(self) -> bool:
        return self._standing.error is not None or self._signals > 0

    def _drain(self) -> None:
        """Take no new requests, and let the open ones finish until the deadline or a second signal."""
        if self._standing.error is not None or not self._standing.ready or self._drain_s == 0:
            return
        limit, front = self._drain_limit_s, self._crew.front
        deadline = time.monotonic() + limit
        with contextlib.suppress(EngineError):
            self.publish()
            front.drain(limit)
            self.event("draining", drain_s=limit)
            while self._signals < 2 and time.monotonic() < deadline and not front.is_idle:
                time.sleep(DRAIN_POLL_S)

    @property
    def _drain_limit_s(self) -> float:
        return self._spec.section.drain_s if self._drain_s is None else self._drain_s

    def _end(self) -> None:
        self._standing.ending = True
        self._adapters.close()
        self._crew.end()

    # -- signals and orders ------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        self._standing.ending = True

    def stop(self, drain_s: float | None = None) -> None:
        """Stop as SIGTERM does; ``drain_s`` instead of the recipe's, 0 at once."""
        if drain_s is not None:
            self._drain_s = drain_s
        self._signals += 1
        self._standing.ending = True
        self._wake.set()

    def _handle(
        self, method: str, path: str, body: Mapping[str, Any]
    ) -> tuple[int, Mapping[str, Any]]:
        """The control socket."""
        if (method, path) == ("GET", "/status"):
            return 200, asdict(self._standing.status())
        if (method, path) == ("GET", "/certificate"):
            return 200, self._standing.certificate()
        if (method, path) == ("POST", "/stop"):
            self.stop(body.get("drain_s"))
            return 200, {"stopping": self._spec.name, "drain_s": self._drain_limit_s}
        if path == "/adapters" or path.startswith("/adapters/"):
            return self._adapters.handle(method, path, body)
        return 404, {"error": {"message": f"the control socket knows no {method} {path}"}}

    # -- what parts tell ---------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """See ``parts.Owner``."""
        parts = [asdict(state) for state in self._crew.states()]
        self.event("parts", ready=self._standing.ready, parts=parts)
        if self._standing.news:
            with contextlib.suppress(EngineError):
                self.publish()

    def failed(self, error: ToolkitError) -> None:
        """See ``parts.Owner``."""
        self._standing.fail(error)
        self._wake.set()

    def event(self, event: str, **values: Any) -> None:
        """See ``fleet.Fleet``."""
        self._events.send(event, seconds=self._seconds(), **values)

    def desired(self) -> tuple[AdapterSpec, ...]:
        """See ``replicas.Fleet``."""
        return self._adapters.desired()

    def admit(self, replica: Proving, endpoint: Endpoint, loaded: Sequence[AdapterSpec]) -> None:
        """See ``replicas.Fleet``."""
        shown = dict(self._proofs.prove_engine(endpoint, loaded, replica.proving))
        for name, text in told(shown).items():
            self.event("note", part=replica.name, text=f"{name}: {text}")
        with self._change_lock:
            shown |= self._adapters.catch_up(endpoint, loaded)
            self._adapters.certificate(shown)
            self._standing.join(endpoint)
            if self._crew.router:
                self._crew.router.add(endpoint.url)
            with contextlib.suppress(EngineError):
                self.publish()

    def dismiss(self, endpoint: Endpoint) -> None:
        """See ``replicas.Fleet``."""
        if not self._standing.leave(endpoint):
            return
        if self._crew.router:
            self._crew.router.remove(endpoint.url)
        if not self._standing.ending:
            with contextlib.suppress(EngineError):
                self.publish()

    # -- what adapters may ask ----------------------------------------------------------------------------------------

    @property
    def spec(self) -> ServerSpec:
        """See ``fleet.Fleet``."""
        return self._spec

    def endpoints(self) -> tuple[Endpoint, ...]:
        """See ``fleet.Fleet``."""
        return self._standing.endpoints()

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
        return dict(self._crew.front.status().get("in_flight", {}))

    def publish(self) -> None:
        """See ``fleet.Fleet``."""
        self._crew.front.push(self._standing.table)

    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 2)
