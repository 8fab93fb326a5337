"""vllm-router on loopback: balances over replicas, retries what a dying one left. It has no authentication."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from toolkit.engines import LOOPBACK, server
from toolkit.engines.client import Client
from toolkit.errors import EngineError, NotInstalledError
from toolkit.serving.parts import Answering, Owner, StopRequestedError
from toolkit.stages import Interpreter

START_S = 60.0
ANSWER_S = 10.0
WAIT_S = 0.2


def arguments(
    python: Path, port: int, metrics_port: int, workers: Sequence[str]
) -> tuple[str, ...]:
    """The command line; every address is loopback, because its admin routes ask nobody who they are."""
    return (
        *(str(python), "-m", "vllm_router.launch_router"),
        *("--host", LOOPBACK, "--port", str(port)),
        *("--prometheus-host", LOOPBACK, "--prometheus-port", str(metrics_port)),
        *("--worker-urls", *workers),
        # Requests of one beginning go where that beginning is cached, unless that engine has clearly more to do;
        # with the thresholds as they come, up to 64 requests would wait for one engine while the other idles.
        *("--policy", "cache_aware"),
        *("--balance-abs-threshold", "4", "--balance-rel-threshold", "1.2"),
        # We add a worker when it is proven and remove it when it is gone; these notice what we cannot see.
        *("--health-check-interval-secs", "2", "--health-check-timeout-secs", "10"),
        *("--health-failure-threshold", "2", "--health-success-threshold", "1"),
        *("--cb-timeout-duration-secs", "2", "--worker-startup-check-interval", "1"),
        *("--retry-max-retries", "5", "--request-timeout-secs", "86400"),
        *("--max-concurrent-requests", "1000000", "--log-level", "warning"),
    )


class Router(Answering):
    """The router's process, under a guard.

    Args:
        owner: The supervisor.
        interpreter: The Python of the environment ``router``.
        ports: Its own and that of its metrics; held by the supervisor.
        log: File for what it prints.
    """

    def __init__(
        self, owner: Owner, interpreter: Interpreter, ports: tuple[int, int], log: Path
    ) -> None:
        super().__init__("router", owner, log)
        self.url = f"http://{LOOPBACK}:{ports[0]}"
        self._interpreter = interpreter
        self._ports = ports
        self._workers: list[str] = []
        self._settling = threading.Lock()
        self._client = Client(self.url)

    def add(self, worker: str) -> None:
        """Give a worker traffic: at once where the router runs, otherwise when it starts."""
        if worker not in self._workers:
            self._workers.append(worker)
        self._settle_if_ready()

    def remove(self, worker: str) -> None:
        """Take a worker's traffic away."""
        if worker in self._workers:
            self._workers.remove(worker)
        self._settle_if_ready()

    def ask(self) -> None:
        """See :class:`Answering`; its list is put right by the way."""
        self._settle()

    def _settle_if_ready(self) -> None:
        if self.state.state == "ready":
            with contextlib.suppress(EngineError):  # dying; its next life starts with the list
                self._settle()

    def live(self) -> None:
        """One life of the process; it starts when there is a worker."""
        while not self._workers:
            self.become("starting", detail="waiting for a replica")
            if self.stopping.wait(WAIT_S):
                raise StopRequestedError
        workers = tuple(self._workers)
        process = self._spawn(workers)
        try:
            self.become("starting", pid=process.pid, url=self.url)
            self._await_health(process)
            self._settle()  # who joined or left while it started
            self.become("ready", pid=process.pid, url=self.url)
            self.ready_once.set()
            self.watch(process)
        finally:
            server.stop(process, hurry=True)

    def _spawn(self, workers: Sequence[str]) -> server.Process:
        python = self._interpreter.python
        if not python.exists():
            raise NotInstalledError(f"no interpreter at {python}", "toolkit env sync router")
        argv = arguments(python, *self._ports, workers)
        return server.guarded(argv, self._interpreter.environ(), self.log)

    def _settle(self) -> None:
        """Make the router's list of workers ours."""
        with self._settling:
            has = self._list()
            wanted = tuple(self._workers)
            for worker in (w for w in wanted if w not in has):
                self._tell("add_worker", worker)
            for worker in (w for w in has if w not in wanted):
                self._tell("remove_worker", worker)

    def _list(self) -> list[str]:
        content = self._ask("GET", "/list_workers")
        try:
            return [str(url) for url in json.loads(content)["urls"]]
        except (ValueError, KeyError, TypeError):
            text = f"the router's list of workers is none: {content[:200]!r}"
            raise EngineError(text, self.hint) from None

    def _await_health(self, process: server.Process) -> None:
        deadline = time.monotonic() + START_S
        while not self._client.healthy():
            self.check(process)
            if time.monotonic() > deadline:
                raise EngineError(f"the router was not healthy after {START_S:.0f} s", self.hint)
            if self.stopping.wait(WAIT_S):
                raise StopRequestedError

    def _tell(self, verb: str, worker: str) -> None:
        self._ask("POST", f"/{verb}?{urllib.parse.urlencode({'url': worker})}")

    def _ask(self, method: str, path: str) -> bytes:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        asked = urllib.request.Request(self.url + path, method=method)  # noqa: S310 - loopback
        try:
            with opener.open(asked, timeout=ANSWER_S) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            text = error.read(500).decode(errors="replace")
            raise EngineError(f"the router answered {error.code} to {path}: {text}") from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"the router does not answer: {error}", self.hint) from None
