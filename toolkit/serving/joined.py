"""Engines that somebody else runs, on this or another host: proven like ours and balanced with them.

They are never started and never ended. One that goes away loses its traffic and gets it back when it answers again, has
every adapter that is wanted now, and is proven anew; however long that takes, the server goes on with the others.
"""

from __future__ import annotations

import time

from toolkit.engines import ENGINES, Engine
from toolkit.engines.client import Client
from toolkit.errors import EngineError, ToolkitError
from toolkit.serving.parts import StopRequestedError
from toolkit.serving.replicas import Fleet, Proving, Pulse
from toolkit.serving.state import Endpoint, ServerSpec

LOOK_S = 1.0
"""Pause between two looks at an engine that does not answer."""
AGAIN_S = 10.0
"""Pause before an engine that was refused is proven again: it may be somebody's new version of it."""


class Joined(Proving):
    """One of ``serve.engines``.

    Args:
        owner: The supervisor.
        spec: The server.
        index: After those of the replicas.
        url: Where it listens.
        again_s: See :data:`AGAIN_S`.
    """

    def __init__(
        self, owner: Fleet, spec: ServerSpec, index: int, url: str, *, again_s: float = AGAIN_S
    ) -> None:
        super().__init__(f"joined-{index - spec.section.replicas}", owner)
        self.index = index
        self.url = url.rstrip("/")
        self._start_s = float(spec.section.start_timeout_s)
        self._again_s = again_s
        self._generation = 0
        engine: Engine = ENGINES[spec.section.engine]()
        self._model_id = engine.model_id(spec.deployment(()), None)

    def live(self) -> None:
        """Until the server ends; only a first start can fail.

        Raises:
            EngineError: It did not answer in ``serve.start_timeout_s`` of the first start.
            ProofError: What it serves, when it joins first, is not what was trained.
        """
        deadline = time.monotonic() + self._start_s
        while True:
            self._await_health(deadline)
            self._generation += 1
            try:
                self._serve(Endpoint(self.index, self.url, self._generation))
            except ToolkitError as error:
                if not self.ready_once.is_set():
                    raise
                self.owner.event("note", part=self.name, text=f"{self.url} left: {error.message}")
                self.become("waiting", url=self.url, detail=error.message)
            self._pause(self._again_s)

    def _serve(self, endpoint: Endpoint) -> None:
        """Prove it and watch it.

        Raises:
            ToolkitError: It is not what was trained, or does not answer any more.
        """
        self.become("proving", url=self.url)
        try:
            self.owner.admit(self, endpoint, ())
            self.become("ready", url=self.url)
            self.ready_once.set()
            pulse = Pulse(self.url, self._model_id, self.owner.health)
            while True:
                self._pause(self.owner.health.poll_s)
                pulse.check()
        finally:
            self.owner.dismiss(endpoint)

    def _await_health(self, deadline: float) -> None:
        client = Client(self.url)
        while not client.healthy():
            if not self.ready_once.is_set():
                self.become("starting", url=self.url, detail="no answer yet")
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"serve.engines names {self.url}, which did not answer in {self._start_s:.0f} s",
                        "start it there, or take it out of serve.engines",
                    )
            self._pause(LOOK_S)

    def _pause(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            raise StopRequestedError
