"""Adapters inside the engines of a server: loaded and proven on one of them or on all, and unloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from toolkit.engines import Call, Engine
from toolkit.engines.client import Client
from toolkit.errors import EngineError
from toolkit.serving.fleet import Fleet
from toolkit.serving.state import AdapterSpec, Endpoint

LOAD_TIMEOUT_S = 300.0


class Engines:
    """What one change of adapters asks of engines.

    Args:
        fleet: Proves what was loaded.
        engine: Knows the calls.
        say: Told in a few words what is done now.
    """

    def __init__(self, fleet: Fleet, engine: Engine, say: Callable[[str], None]) -> None:
        self._fleet, self._engine, self._say = fleet, engine, say

    def bring_all(
        self, endpoints: Sequence[Endpoint], new: Sequence[AdapterSpec]
    ) -> Mapping[str, Any]:
        """On every replica at once; raises the first failure of :meth:`bring` when all have ended.

        Returns:
            The proofs of one of them.
        """
        with ThreadPoolExecutor(len(endpoints)) as pool:
            running = [pool.submit(self.bring, endpoint, new) for endpoint in endpoints]
        first, *_ = [done.result() for done in running]
        return first

    def bring(self, endpoint: Endpoint, specs: Sequence[AdapterSpec]) -> Mapping[str, Any]:
        """Load what is missing in one engine and prove all of it; the proofs by ``lora_name``.

        Raises:
            EngineError: It did not take an adapter.
            ProofError: What it serves is not what was trained.
        """
        if not specs:
            return {}
        there = _loaded(endpoint)
        for spec in specs:
            if spec.lora_name not in there:
                self._say(f"loading {spec.lora_name} on replica {endpoint.index}")
                _send(endpoint, self._engine.load_adapter(spec.lora_name, spec.place))
        names = ", ".join(spec.lora_name for spec in specs)
        self._say(f"proving {names} on replica {endpoint.index}")
        return self._fleet.prove(endpoint, specs)

    def forget(self, endpoint: Endpoint, names: AbstractSet[str]) -> None:
        """Unload what is there; an engine that does not answer is started again, without them."""
        try:
            for name in sorted(names & _loaded(endpoint)) if names else ():
                _send(endpoint, self._engine.unload_adapter(name))
        except EngineError as error:
            self._fleet.event("note", text=f"replica {endpoint.index}: {error.message}")


def _loaded(endpoint: Endpoint) -> AbstractSet[str]:
    return {name for name in Client(endpoint.url).models() if "@" in name}


def _send(endpoint: Endpoint, call: Call) -> None:
    Client(endpoint.url, timeout_s=LOAD_TIMEOUT_S).call(call)
