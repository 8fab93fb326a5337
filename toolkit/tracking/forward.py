"""The thread that carries an outbox to MLflow while work goes on."""

from __future__ import annotations

import threading

from toolkit.errors import TrackingError
from toolkit.tracking import client
from toolkit.tracking.deliver import Delivery
from toolkit.tracking.outbox import Outbox
from toolkit.tracking.store import Store

PERIOD_S = 1.0
"""How long records gather before they are sent together."""

FIRST_TRIES = 2
"""Failures after which a run that has to exist is given up."""

LONGEST_PAUSE_S = 30.0
"""Longest time between two tries at a store that does not answer."""


class Forwarder:
    """Delivers in the background, retries for ever, and never raises into the work."""

    def __init__(self, outbox: Outbox, store: Store) -> None:
        self._delivery = Delivery(outbox, store)
        self._changed = threading.Condition()
        self._closing = False
        self._finished = False
        self._failures = 0
        self.lost: Exception | None = None
        """Why the last delivery failed; ``None`` while all is well."""
        self._thread = threading.Thread(target=self._work, name="mlflow-forwarder", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once it exists."""
        return self._delivery.run_id

    def wait_for_run(self, timeout_s: float) -> str | None:
        """Wait until the run exists or delivery failed for good; return its id or ``None``."""
        with self._changed:
            self._changed.wait_for(lambda: self.run_id or self._hopeless, timeout_s)
        return self.run_id

    def close(self, timeout_s: float) -> bool:
        """Try once more, for at most ``timeout_s``; return whether the run's end was delivered."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return self._finished

    @property
    def _hopeless(self) -> bool:
        """Two failures, or one that the user must mend; one may be two processes making tables."""
        return self._failures >= FIRST_TRIES or isinstance(self.lost, TrackingError)

    def _work(self) -> None:
        client.quiet()
        pause = PERIOD_S
        while True:
            closing = (
                self._closing
            )  # read before delivering: what was put before close() is then surely delivered
            pause = self._try(pause)
            if closing:
                return
            with self._changed:
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closing, pause)

    def _try(self, pause: float) -> float:
        """Deliver once; return how long to wait before the next time."""
        try:
            self._finished = self._delivery.drain() or self._finished
        except Exception as error:  # noqa: BLE001 - whatever MLflow does, the work goes on; sync shows the cause
            self.lost = error
            self._failures += 1
            return min(pause * 2, LONGEST_PAUSE_S)
        self.lost, self._failures = None, 0
        return PERIOD_S
