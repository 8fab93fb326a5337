"""Adapters of a running server: loaded, swapped and unloaded under traffic, on all replicas or on none.

Every change goes the same way, so a request sees the old version or the proven new one, never anything between::

    load on every replica ── prove on each ── remember ── move the routes ── old requests finish ── unload the old
    └──── a failure up to here leaves everything as it was ────┘

What the server is to have lies in ``adapters.json`` and outlives every crash; an engine that comes (back) later gets
exactly that, proven, before it gets traffic.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from toolkit.engines import ENGINES, Engine
from toolkit.errors import EngineError
from toolkit.gateway.table import Route
from toolkit.serving import orders
from toolkit.serving.desired import STABLE, Desired, Memory, ensure_unchanged
from toolkit.serving.fleet import Fleet
from toolkit.serving.loading import Engines
from toolkit.serving.proofs import told
from toolkit.serving.room import Room
from toolkit.serving.state import AdapterSpec, Endpoint
from toolkit.serving.watch import Watcher

FILE = "adapters.json"
POLL_S = 0.1
DRAIN_S = 600.0
"""Seconds that open requests on an old version get; then it is unloaded under them (vLLM lets them finish even so)."""


@dataclass
class Change:
    """What a command did.

    Attributes:
        loaded: Engine's names of adapters that are new.
        unloaded: Those that went.
        seconds: By phase: ``load``, ``route``, ``drain``.
        cut: Requests that were still open on the old version when their time was over.
        proven: What was shown of those that are new, in words; also what was not checked.
    """

    loaded: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    cut: int = 0
    proven: dict[str, str] = field(default_factory=dict)


class AdapterSet:
    """The adapters of one server; see :class:`toolkit.serving.fleet.Adapters`.

    Methods may be called from any thread; changes are made one after the other.

    Args:
        fleet: Engines, front and proofs.
        check: Preflight of a version, before any engine sees it; raises PreflightError.

    Raises:
        ArtifactError: ``adapters.json`` of an earlier life is damaged.
    """

    def __init__(self, fleet: Fleet, check: Callable[[AdapterSpec], None] | None = None) -> None:
        self._fleet = fleet
        engine: Engine = ENGINES[fleet.spec.section.engine]()
        self._engines = Engines(fleet, engine, self._say)
        self._recipe = Desired(fleet.spec.adapters)
        watched = fleet.spec.section.watch_s is not None
        self._memory = Memory(fleet.spec.place / FILE, watched=watched)
        self._now = self._memory.recall(self._recipe)
        self._room = Room.of(fleet.spec.with_room(self._now.specs), self._now.specs, engine, check)
        self._retiring: frozenset[str] = frozenset()
        self._told = True  # the front has the newest routes
        self._changing = threading.Lock()
        self._closing = threading.Event()
        self._watcher: Watcher | None = None
        self.doing = ""
        """What a change is at, in a few words; empty while there is none."""

    def desired(self) -> tuple[AdapterSpec, ...]:
        """Every version that a (re)starting engine must have."""
        return self._now.specs

    def routes(self) -> tuple[Route, ...]:
        """Public names of adapters with their targets."""
        return self._now.routes(self._fleet.model_id)

    @property
    def room(self) -> Room:
        """What the engines have room for."""
        return self._room

    def load(self, spec: AdapterSpec) -> Change:
        """Add a public name. Raises like :meth:`swap`."""
        self._room.refuse_name(spec.name)
        return self._change(lambda now: now.load(spec), spare=1)

    def unload(self, name: str) -> Change:
        """Take a public name away: new requests get 404, open ones finish."""
        return self._change(lambda now: now.unload(name))

    def swap(self, spec: AdapterSpec, label: str = STABLE) -> Change:
        """Replace a version under traffic.

        Raises:
            UsageError: No such adapter, no slot is free, or its rank is above the engine's; nothing changed.
            PreflightError: The engine cannot serve such an adapter; nothing changed.
            EngineError: A replica did not load it; nothing changed.
            ProofError: It is not what was trained; nothing changed.
        """
        return self._change(lambda now: now.swap(spec, label))

    def canary(self, spec: AdapterSpec, weight: float, label: str) -> Change:
        """Put a second version beside the stable one. Raises like :meth:`swap`."""
        return self._change(lambda now: now.canary(spec, weight, label))

    def promote(self, name: str) -> Change:
        """The canary takes all requests, the stable one goes."""
        return self._change(lambda now: now.promote(name))

    def abort(self, name: str) -> Change:
        """The stable one takes all requests, the canary goes."""
        return self._change(lambda now: now.abort(name))

    def certificate(self, proven: Mapping[str, Any]) -> None:  # noqa: ARG002 - the supervisor keeps it
        """An engine was proven with what is desired: from here on the file holds it."""
        self._memory.keep(self._recipe, self._now)

    def catch_up(self, endpoint: Endpoint, loaded: Sequence[AdapterSpec]) -> Mapping[str, Any]:
        """Bring an engine that was started with ``loaded`` to what is desired now, and prove what was added.

        Raises:
            EngineError: It did not take an adapter.
            ProofError: What it serves is not what was trained.
        """
        had = {spec.lora_name for spec in loaded}
        wanted = self._now.by_lora_name
        shown = self._engines.bring(endpoint, [s for name, s in wanted.items() if name not in had])
        self._engines.forget(endpoint, had - wanted.keys())
        return shown

    def handle(
        self, method: str, path: str, body: Mapping[str, Any]
    ) -> tuple[int, Mapping[str, Any]]:
        """Answer ``/adapters...`` of the control socket; see ``orders.py``."""
        return orders.answer(self, method, path, body)

    def start(self) -> None:
        """Follow aliases from now on, if the recipe wants that."""
        every_s = self._fleet.spec.section.watch_s
        if every_s is not None and self._watcher is None:
            self._watcher = Watcher.of(self._fleet, self, every_s)
            self._watcher.start()

    def close(self) -> None:
        """Stop following aliases and waiting for old requests."""
        self._closing.set()
        if self._watcher:
            self._watcher.close()

    def rows(self) -> list[dict[str, Any]]:
        """A row for each version that is loaded, those that finish their last requests too."""
        open_now = self._in_flight() or {}
        served = [self._row(spec, open_now) for spec in self._now.specs]
        return served + [
            {"name": name.partition("@")[0], "label": "retiring", "weight": 0.0}
            | {"version": name.partition("@")[2], "in_flight": open_now.get(self._id(name), 0)}
            for name in sorted(self._retiring)
        ]

    def _say(self, doing: str) -> None:
        self.doing = doing

    def _row(self, spec: AdapterSpec, open_now: Mapping[str, int]) -> dict[str, Any]:
        return {
            "name": spec.name,
            "label": spec.label,
            "weight": round(spec.weight, 6),
            "version": spec.version,
            "in_flight": open_now.get(self._id(spec.lora_name), 0),
            "source": spec.source,
            "registered": spec.registered,
            "run_id": spec.run_id,
            "folder": spec.path,
        }

    def _change(self, step: Callable[[Desired], Desired], *, spare: int = 0) -> Change:
        with self._changing:
            try:
                before, after = self._now, step(self._now)
                new = [s for n, s in after.by_lora_name.items() if n not in before.by_lora_name]
                gone = before.by_lora_name.keys() - after.by_lora_name.keys()
                self._refuse_full(before, new, spare)
                for spec in new:
                    ensure_unchanged(spec)
                    self._room.refuse(spec)
                change = Change(loaded=tuple(s.lora_name for s in new))
                self._go_over(after, new, gone, change)
            finally:
                self.doing = ""
        self._retire(gone, change)
        return change

    def _go_over(
        self, after: Desired, new: Sequence[AdapterSpec], gone: AbstractSet[str], change: Change
    ) -> None:
        began = time.monotonic()
        with self._fleet.changing():
            endpoints = self._fleet.endpoints()
            if not endpoints:
                raise EngineError("no replica is ready", "see `toolkit serve --status`; try again")
            try:
                change.proven = told(self._engines.bring_all(endpoints, new))
                change.seconds["load"] = _since(began)
                began = time.monotonic()
                self._memory.keep(self._recipe, after)
            except BaseException:
                self.doing = "taking it back"
                keep = self._now.by_lora_name.keys() | self._retiring
                for endpoint in endpoints:
                    self._engines.forget(endpoint, {s.lora_name for s in new} - keep)
                raise
            self._now = after
            self._retiring = (self._retiring | gone) - after.by_lora_name.keys()
        self._publish()
        change.seconds["route"] = _since(began)

    def _publish(self) -> None:
        """Tell the front; one that does not answer is told again before anything is unloaded."""
        try:
            self._fleet.publish()
            self._told = True
        except EngineError as error:
            self._told = False
            self._fleet.event("note", text=f"the front did not take the new routes yet: {error}")

    def _retire(self, names: AbstractSet[str], change: Change) -> None:
        """Unload what no route leads to, once its last request is done or its time is over."""
        began = time.monotonic()
        while names & self._retiring and not self._closing.is_set():
            if not self._told:
                self._publish()
            open_now = self._in_flight() if self._told else None
            left = 1 if open_now is None else sum(open_now.get(self._id(n), 0) for n in names)
            if left and _since(began) > DRAIN_S:
                change.cut = left
            if not left or change.cut:
                self._unload(names, change)
                break
            self.doing = f"{left} requests finish on {', '.join(sorted(names))}"
            self._closing.wait(POLL_S)
        self.doing = ""
        change.seconds["drain"] = _since(began)

    def _unload(self, names: AbstractSet[str], change: Change) -> None:
        with self._changing, self._fleet.changing():
            still = names & self._retiring  # a roll-back may have called one again
            for endpoint in self._fleet.endpoints():
                self._engines.forget(endpoint, still)
            self._retiring -= still
        change.unloaded = tuple(sorted(still))

    def _in_flight(self) -> Mapping[str, int] | None:
        """Open requests by model id; ``None`` when the front does not say."""
        try:
            return self._fleet.in_flight()
        except EngineError:
            return None

    def _id(self, lora_name: str) -> str:
        name, _, version = lora_name.partition("@")
        return self._fleet.model_id(AdapterSpec(name, "", version))

    def _refuse_full(self, before: Desired, new: Sequence[AdapterSpec], spare: int) -> None:
        retiring = self._retiring - {spec.lora_name for spec in new}
        added = [spec for spec in new if spec.lora_name not in self._retiring]
        if added:
            self._room.refuse_full(len(before.by_lora_name), len(retiring), len(added), spare)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
