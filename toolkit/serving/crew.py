"""The processes of one server: made with ports, GPUs and sockets of their own, listed front first, ended together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.engines import ports
from toolkit.errors import EngineError, NotInstalledError
from toolkit.gateway.settings import GatewaySettings
from toolkit.gateway.table import Table
from toolkit.serving import gpus
from toolkit.serving.front import Front
from toolkit.serving.joined import Joined
from toolkit.serving.parts import Part
from toolkit.serving.replicas import Fleet, Proving, Replica
from toolkit.serving.router import Router
from toolkit.serving.state import PartState, ServerSpec

FAREWELL_S = 1.0
"""What the front may take to hear that its time is over."""
JOIN_S = 30.0
"""What a part may take to end; then this process ends, and the guards do the rest."""


@dataclass
class Crew:
    """Empty until :meth:`make`; no process runs before its part is started."""

    spec: ServerSpec
    replicas: list[Replica] = field(default_factory=list)
    joined: list[Joined] = field(default_factory=list)
    router: Router | None = None
    _front: Front | None = None

    def make(self, owner: Fleet, table: Table, sockets: Path, held: contextlib.ExitStack) -> None:
        """Make every part: what fails fast fails here, before anything is started.

        Args:
            owner: The supervisor.
            table: What the front knows first.
            sockets: Folder for its control socket.
            held: Keeps the ports until the parts are gone.

        Raises:
            EngineError: A port is taken, or there are too few GPUs.
            NotInstalledError: The router's environment is not built.
        """
        section = self.spec.section
        public = held.enter_context(ports.held(section.port, section.host))
        devices = self._devices()
        self._front = Front(owner, self._front_settings(public, sockets), self.spec.place, table)
        for index in range(section.replicas):
            port = held.enter_context(ports.held(0))
            self.replicas.append(Replica(owner, self.spec, index, port, devices=devices[index]))
        for index, url in enumerate(section.engines, section.replicas):
            self.joined.append(Joined(owner, self.spec, index, url))
        if section.needs_router:
            pair = (held.enter_context(ports.held(0)), held.enter_context(ports.held(0)))
            self.router = self._make_router(owner, pair)

    def end(self) -> None:
        """Stop every part and wait for it: the front first.

        So a request that is still open hears from the front that the server stops, and none is cut off by its engine.
        """
        if self._front:
            with contextlib.suppress(EngineError):  # it drained and is gone, or hangs
                self._front.drain(0.0, timeout_s=FAREWELL_S)
            _end([self._front])
        _end([part for part in (*self.engines, self.router) if part])

    @property
    def front(self) -> Front:
        """The front.

        Raises:
            EngineError: It is not made yet.
        """
        if self._front is None:
            raise EngineError("the front was not started yet")
        return self._front

    @property
    def parts(self) -> list[Part]:
        """The front first."""
        return [part for part in (self._front, *self.engines, self.router) if part]

    @property
    def engines(self) -> list[Proving]:
        """Those that it starts, and those that joined."""
        return [*self.replicas, *self.joined]

    @property
    def url(self) -> str | None:
        """Where clients reach the server."""
        return self._front.url if self._front else None

    def states(self) -> tuple[PartState, ...]:
        """Of every part."""
        return tuple(part.state for part in self.parts)

    def in_flight(self) -> Mapping[str, int]:
        """Open requests by the engine's name of what answers; empty while the front does not say."""
        try:
            return dict(self.front.status().get("in_flight", {}))
        except EngineError:
            return {}

    def _devices(self) -> list[tuple[gpus.Gpu, ...]]:
        section = self.spec.section
        if self.spec.device != "cuda":
            return [()] * section.replicas
        found = gpus.visible(gpus.query())
        return gpus.slices(found, section.replicas, gpus.gpus_per_replica(section))

    def _front_settings(self, port: int, sockets: Path) -> GatewaySettings:
        spec, section = self.spec, self.spec.section
        return GatewaySettings(
            name=spec.name,
            host=section.host,
            port=port,
            control=sockets / "front",
            front=section.front.beside(Path(spec.recipe_dir)),
            keys_file=Path(spec.keys_file) if spec.keys_file else None,
            access_log=spec.place / "access.log",
            tracking_uri=(spec.store or {}).get("uri"),
            state_file=spec.place / "front.state.json",
        )

    def _make_router(self, owner: Fleet, pair: tuple[int, int]) -> Router:
        if self.spec.router is None:
            raise NotInstalledError(
                "several engines need the environment 'router', which is not built",
                "toolkit env sync router",
            )
        return Router(owner, self.spec.router.interpreter(), pair, self.spec.place / "router.log")


def _end(parts: Sequence[Part]) -> None:
    for part in parts:
        part.stop()
    for part in parts:
        part.join(JOIN_S)
