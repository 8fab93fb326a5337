"""A server without its supervisor: real engine processes (``fake_vllm.py``), and a front that counts what is open."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.engines.client import Client
from toolkit.engines.ports import held
from toolkit.errors import EngineError, ProofError
from toolkit.gateway.table import Route
from toolkit.proof import AdapterProof
from toolkit.serving.adapters import AdapterSet
from toolkit.serving.state import AdapterSpec, Endpoint, InterpreterSpec, ServerSpec

PROGRAM = Path(__file__).with_name("fake_vllm.py")


def server_spec(
    folder: Path, model: Path, adapters: Sequence[AdapterSpec] = (), **serve: Any
) -> ServerSpec:
    place = folder / "runs" / "servers" / "demo"
    place.mkdir(parents=True, exist_ok=True)
    return ServerSpec(
        name="demo",
        subject="base",
        folder=str(place),
        model=str(model),
        model_version="0" * 16,
        base_name="demo-base",
        max_length=64,
        device="cpu",
        serve={"engine": "vllm", **serve},
        engine=InterpreterSpec(sys.executable),
        adapters=tuple(adapters),
    )


def shown(name: str, model_id: str) -> AdapterProof:
    """A proof of an adapter that nobody could hold against its training."""
    return AdapterProof(
        name, model_id, parity=None, agreement=None, scale=None, unexplained=None, digests={},
        effect_mean=0.38, effect_max=1.0, noise_mean=0.0, noise_max=0.0, seconds=0.0,
    )  # fmt: skip


class TestFleet:
    """``toolkit.serving.fleet.Fleet`` for tests."""

    __test__ = False

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.running: list[Endpoint] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.routes: tuple[Route, ...] = ()
        self.adapters: AdapterSet | None = None
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.refuses: set[str] = set()
        self.proven: list[tuple[int, str]] = []
        self.before_proof: Callable[[Endpoint, AdapterSpec], None] = lambda *_: None
        self.open: Counter[str] = Counter()
        self.front_is_up = True
        self._lock = threading.Lock()
        self._change = threading.RLock()

    def endpoints(self) -> tuple[Endpoint, ...]:
        return tuple(self.running)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        with self._change:
            yield

    def model_id(self, adapter: AdapterSpec | None) -> str:
        return adapter.lora_name if adapter else "demo-base"

    def prove(self, endpoint: Endpoint, adapters: Sequence[AdapterSpec]) -> Mapping[str, Any]:
        for adapter in adapters:
            self.before_proof(endpoint, adapter)
            if adapter.version in self.refuses:
                raise ProofError(
                    f"{adapter.lora_name} answers as the base does", "is it all zeros?"
                )
            answer = Client(endpoint.url).chat(
                adapter.lora_name, [{"role": "user", "content": "?"}]
            )
            assert answer.text.startswith(adapter.lora_name)
            self.proven.append((endpoint.index, adapter.lora_name))
        return {adapter.lora_name: shown(adapter.name, adapter.lora_name) for adapter in adapters}

    def in_flight(self) -> Mapping[str, int]:
        if not self.front_is_up:
            raise EngineError("the front does not answer")
        with self._lock:
            return dict(self.open)

    def publish(self) -> None:
        if not self.front_is_up:
            raise EngineError("the front does not answer")
        assert self.adapters
        with self._lock:
            self.routes = self.adapters.routes()

    def event(self, event: str, **values: Any) -> None:
        self.told.append((event, values))

    # -- not part of the seam ----------------------------------------------------------------------------------------

    def serve(self) -> AdapterSet:
        """As the supervisor starts: engines are there, their adapters proven, the routes published."""
        self.adapters = AdapterSet(self)
        for endpoint in self.running:
            self.prove(endpoint, self.adapters.desired())
        self.adapters.certificate({a.lora_name: {} for a in self.adapters.desired()})
        self.publish()
        return self.adapters

    def start_engine(self, adapters: Sequence[AdapterSpec] = ()) -> Endpoint:
        with held(0) as port:
            argv = [sys.executable, str(PROGRAM), str(port), "demo-base"]
            argv += [*(f"{a.lora_name}={a.path}" for a in adapters), "--start-s", "0"]
            process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True)
            endpoint = Endpoint(len(self.running), f"http://127.0.0.1:{port}", 1)
            while not Client(endpoint.url).healthy():
                assert process.poll() is None
                time.sleep(0.02)
        self.running.append(endpoint)
        self.processes.append(process)
        return endpoint

    def fake(self, endpoint: Endpoint, **behaviour: Any) -> None:
        request = urllib.request.Request(f"{endpoint.url}/_fake", json.dumps(behaviour).encode())
        urllib.request.urlopen(request, timeout=5).close()

    def loaded(self) -> list[set[str]]:
        """Adapters in each engine that lives."""
        return [
            {name for name in Client(e.url).models() if "@" in name}
            for e, process in zip(self.running, self.processes, strict=True)
            if process.poll() is None
        ]

    def ask(self, name: str, number: int, words: int) -> tuple[str, str]:
        """A stream through the front: the version that it was routed to, and the text."""
        with self._lock:
            route = next(r for r in self.routes if r.name == name)
            model = route.targets[0].model_id
            self.open[model] += 1
        try:
            url = self.running[number % len(self.running)].url
            ask = [{"role": "user", "content": str(number)}]
            deltas = Client(url).stream(model, ask, max_tokens=words)
            return model, "".join(delta.text for delta in deltas)
        finally:
            with self._lock:
                self.open[model] -= 1

    def close(self) -> None:
        if self.adapters:
            self.adapters.close()
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)  # it has a child that ignores SIGTERM
            process.wait()
