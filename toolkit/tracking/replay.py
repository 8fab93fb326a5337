"""Carry to MLflow what it missed: outboxes whose writer is gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolkit.tracking.deliver import Delivery, UndeliveredError
from toolkit.tracking.outbox import Outbox
from toolkit.tracking.store import Store


@dataclass(frozen=True)
class Replayed:
    """What became of one outbox.

    Attributes:
        name: Step or recipe.
        run_id: Its MLflow run, if there is one now.
        lost: Why it could not be delivered now; ``None`` if it was.
        refused: Records that MLflow will never take.
    """

    name: str
    run_id: str | None
    lost: str | None
    refused: tuple[str, ...] = ()


def sync(outboxes: Path) -> list[Replayed]:
    """Deliver every outbox that no living process writes; those delivered are removed.

    A run whose process died without a word ends KILLED. A store that does not answer is asked once,
    not once per outbox.
    """
    down: dict[str, str] = {}
    return [_replay(outbox, down) for outbox in _left(outboxes)]


def _left(outboxes: Path) -> Iterator[Outbox]:
    for folder in sorted(outboxes.glob("*/")) if outboxes.is_dir() else ():
        outbox = Outbox(folder)
        if outbox.empty() or not outbox.hold():
            continue  # its writer is about to begin, or lives
        if outbox.empty():
            outbox.release()  # delivered and removed in between
        else:
            yield outbox


def _replay(outbox: Outbox, down: dict[str, str]) -> Replayed:
    create = next(record for record in outbox.records(0) if record.op == "create").values
    store, name = Store.read(create["store"]), str(create["name"])
    if store.uri in down:
        outbox.release()
        return Replayed(name, outbox.delivered.run_id, down[store.uri])
    if not outbox.finished():
        outbox.mend()
        outbox.put("finish", status="KILLED", ms=int(time.time() * 1000))
    try:
        Delivery(outbox, store).drain()
    except UndeliveredError as error:
        down[store.uri] = str(error)
        outbox.release()
        return Replayed(name, outbox.delivered.run_id, str(error))
    delivered = outbox.delivered
    outbox.remove()
    return Replayed(name, delivered.run_id, None, delivered.refused)
