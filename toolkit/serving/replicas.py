"""Engines of one server, each on GPUs and a port of its own: restarted alone, and in no traffic before its proofs."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from toolkit.engines import ENGINES, LOOPBACK, Engine
from toolkit.engines.client import Client
from toolkit.engines.guard import descendants, stat_fields
from toolkit.engines.server import Server, started
from toolkit.errors import EngineError
from toolkit.serving import gpus
from toolkit.serving.parts import Health, Owner, Part, StopRequestedError
from toolkit.serving.state import AdapterSpec, Endpoint, ServerSpec
from toolkit.stages import Interpreter

FREED_S = 15.0
"""How long a GPU may take to give back what a killed engine held."""
DYING_S = 8.0
"""How long a guard may take to end what a dead engine left."""
TOKENS = re.compile(r"^\w+:(?:prompt|generation)_tokens_total(?:\{.*\})? (\S+)$", re.MULTILINE)
"""Counters of ``/metrics`` that move while an engine works."""


class Fleet(Owner, Protocol):
    """What a replica asks of the supervisor."""

    def desired(self) -> tuple[AdapterSpec, ...]:
        """Adapters that an engine is started with."""

    def admit(self, replica: Proving, endpoint: Endpoint, loaded: Sequence[AdapterSpec]) -> None:
        """Prove a healthy engine and give it traffic.

        Raises:
            ToolkitError: It does not serve what was trained.
        """

    def dismiss(self, endpoint: Endpoint) -> None:
        """An engine is gone, or about to be."""


class Proving(Part):
    """An engine that gets traffic when it is proven."""

    owner: Fleet
    url: str

    def proving(self, what: str) -> None:
        """Say what is proven now.

        Raises:
            StopRequestedError: Nobody waits for it any more.
        """
        if self.stopping.is_set():
            raise StopRequestedError
        self.become("proving", url=self.url, detail=what)


class Replica(Proving):
    """One engine under its guard.

    Args:
        owner: The supervisor.
        spec: The server.
        index: From 0.
        port: A port on loopback, held by the supervisor: it stays the same over restarts.
        devices: Its GPUs; empty on a CPU.
        look: Reads the GPUs' free memory now.
    """

    def __init__(
        self,
        owner: Fleet,
        spec: ServerSpec,
        index: int,
        port: int,
        *,
        devices: Sequence[gpus.Gpu] = (),
        look: Callable[[], list[gpus.Gpu]] = gpus.query,
    ) -> None:
        super().__init__(f"replica-{index}", owner)
        self.index = index
        self.phases: dict[str, float] = {}
        """Seconds by phase of the last start."""
        self._spec = spec
        self._port = port
        self.url = f"http://{LOOPBACK}:{port}"
        self._devices = tuple(devices)
        self._look = look
        self._generation = 0
        self._engine: Engine = ENGINES[spec.section.engine]()

    @property
    def log(self) -> Path:
        """What the engine of this life prints; that of the one before has ``.1`` behind its name."""
        return self._spec.place / f"engine-{self.index}.log"

    def live(self) -> None:
        """One life of the engine."""
        loaded = self.owner.desired()
        deployment = self._spec.deployment(loaded)
        serve = deployment.serve.model_copy(
            update={"port": self._port, "memory_fraction": self._fraction()}
        )
        self._keep_old_log()
        self._generation += 1
        endpoint = Endpoint(self.index, self.url, self._generation)
        self.become("starting", pid=None, url=self.url)
        with started(
            self._spec.section.engine,
            self._interpreter(),
            replace(deployment, serve=serve),
            self.log,
            self._on_phase,
        ) as server:
            self.phases = dict(server.phases)
            self.become("proving", pid=server.pid, url=self.url)
            try:
                self.owner.admit(self, endpoint, loaded)
                self.become("ready", pid=server.pid, url=self.url)
                self.ready_once.set()
                self._watch(server)
            finally:
                self.owner.dismiss(endpoint)
            raise StopRequestedError  # `started` ends the engine when something is raised

    def _on_phase(self, phase: str, _seconds: float) -> None:
        if self.stopping.is_set():
            raise StopRequestedError
        self.become("starting", url=self.url, detail=phase)

    def _interpreter(self) -> Interpreter:
        """The engine's, told which GPUs are its own."""
        interpreter = self._spec.engine.interpreter()
        if not self._devices:
            return interpreter
        names = ",".join(gpu.uuid for gpu in self._devices)
        variables = {**interpreter.variables, "CUDA_VISIBLE_DEVICES": names}
        return replace(interpreter, variables=variables)

    def _fraction(self) -> float:
        """The share of GPU memory to ask for, by what is free now.

        Raises:
            EngineError: The model does not fit into what is free.
        """
        serve = self._spec.section
        if not self._devices:
            return serve.memory_fraction
        weights = gpus.weights_mib(Path(self._spec.model))
        deadline = time.monotonic() + (FREED_S if self._generation else 0)
        while True:
            mine = self._mine()
            late = time.monotonic() >= deadline
            try:
                found = gpus.room(
                    mine, serve.memory_fraction, weights, free_at_start=serve.engine != "sglang"
                )
            except EngineError:
                if late:
                    raise
            else:
                if found.shrunk and late:
                    self.owner.event("note", part=self.name, text=found.shrunk)
                if late or not found.shrunk:
                    return found.fraction
            if self.stopping.wait(0.5):
                raise StopRequestedError

    def _mine(self) -> list[gpus.Gpu]:
        """Its GPUs as they are now.

        Raises:
            EngineError: One of them is not there any more.
        """
        now = {gpu.uuid: gpu for gpu in self._look()}
        gone = [gpu.index for gpu in self._devices if gpu.uuid not in now]
        if gone:
            raise EngineError(
                f"nvidia-smi does not see GPU {', '.join(gone)} any more",
                "look at `nvidia-smi` and `dmesg`: it may need a reset",
            )
        return [now[gpu.uuid] for gpu in self._devices]

    def _keep_old_log(self) -> None:
        if self.log.exists():
            self.log.replace(self.log.with_name(f"{self.log.name}.1"))

    def _watch(self, server: Server) -> None:
        """Return when told to stop.

        Raises:
            EngineError: The engine ended, or hangs.
        """
        pulse = Pulse(self.url, self._model_id, self.owner.health)
        while not self.stopping.wait(self.owner.health.poll_s):
            server.check()
            try:
                pulse.check(server.pid)
            except EngineError:
                self._await_death(server)
                raise

    def _await_death(self, server: Server) -> None:
        """Raise the engine's own last words where nothing listens any more: it died, and its guard tidies up."""
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, self._port)) == 0:
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(DYING_S)
        server.check()

    @property
    def _model_id(self) -> str:
        return self._engine.model_id(self._spec.deployment(()), None)


class Pulse:
    """Notices an engine that runs and does nothing, and costs a busy one nothing.

    ``/health`` is asked every two seconds. When it is slow, or when the engine's own counters saw no new token for
    a while, the engine is asked for one token with a deadline; one that was busy shows that by its counters and is
    left alone.
    """

    def __init__(self, url: str, model_id: str, health: Health) -> None:
        self._url = url
        self._model_id = model_id
        self._health = health
        now = time.monotonic()
        self._asked, self._alive = now, now
        self._tokens: tuple[str, ...] = ()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def check(self, pid: int | None = None) -> None:
        """Look whether it is time to, and ask; ``pid`` is that of its guard, where it runs here.

        Raises:
            EngineError: The engine hangs.
        """
        now = time.monotonic()
        if now - self._asked < self._health.shallow_s:
            return
        quick = self._get("/health", self._health.slow_s) is not None
        if not quick or now - self._alive > self._health.quiet_s:
            self._look_closer(pid, quick=quick)
        self._asked = time.monotonic()

    def _look_closer(self, pid: int | None, *, quick: bool) -> None:
        if quick and self._worked():
            self._alive = time.monotonic()
            return
        stopped = pid is not None and any_stopped(pid)
        deadline_s = self._health.stopped_s if stopped else self._health.deep_s
        client = Client(self._url, timeout_s=deadline_s)
        try:
            client.complete(self._model_id, "1", max_tokens=1, temperature=0)
        except EngineError as error:
            why = "its process is stopped" if stopped else error.message
            raise EngineError(f"the engine hangs: no token in {deadline_s:g} s ({why})") from None
        self._worked()
        self._alive = time.monotonic()

    def _worked(self) -> bool:
        """Whether the engine's counters moved since the last look."""
        text = self._get("/metrics", self._health.slow_s) or ""
        tokens, self._tokens = self._tokens, tuple(TOKENS.findall(text))
        return bool(tokens) and tokens != self._tokens

    def _get(self, path: str, timeout_s: float) -> str | None:
        try:
            with self._opener.open(self._url + path, timeout=timeout_s) as answer:
                content: bytes = answer.read()
                return content.decode(errors="replace")
        except (OSError, http.client.HTTPException):  # refused, gone, or cut off while it died
            return None


def any_stopped(pid: int) -> bool:
    """Whether a process below ``pid`` was stopped by a signal."""
    states = []
    for child in descendants(pid):
        try:
            states.append(stat_fields(child)[0])
        except OSError:  # it ended meanwhile
            continue
    return "T" in states
