"""The keeper: hands jobs to engines that keep no order themselves, sees each to its end, and starts it again.

``python -m toolkit.launch.keeper JOBS``: one process for a workspace on a machine, started by whoever submits, gone
when nothing was left to do for a while. It may be killed at any moment: jobs go on without it, and what it knows is on
disk, in its queue (DBOS on SQLite) and in the folders of the jobs, which have the last word.

A job is one durable workflow, named by the job's id and round, so that enqueueing it twice is once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbos import DBOS, DBOSConfig, Queue, SetWorkflowID

from toolkit.digests import of_json
from toolkit.errors import ToolkitError
from toolkit.launch import keeper_process, report, retries
from toolkit.launch.backend import backend_of
from toolkit.launch.folder import JobFolder, read
from toolkit.launch.local.places import Places
from toolkit.launch.local.section import LocalSection
from toolkit.launch.locks import hold, let_go
from toolkit.launch.settle import settle
from toolkit.launch.states import State
from toolkit.launch.supervise import Supervisor, write_off
from toolkit.workspace import private_folder

IDLE_S = 600.0
"""How long it stays without anything to do: a start takes seconds."""
LOOK_S = 0.1
AT_ENGINES = 1000
"""Jobs that may wait in an engine that queues by itself."""
log = logging.getLogger("toolkit.keeper")

_supervisors: dict[str, Supervisor] = {}


@DBOS.workflow()
async def supervise_job(folder: str) -> str:
    """See one job to its end, through all its tries."""
    tries = 0
    while await supervise_attempt(folder, tries) == "again":
        tries += 1
        await DBOS.sleep_async(retries.pause_s(JobFolder(Path(folder)).ends))
    return "over"


@DBOS.step()
async def supervise_attempt(folder: str, _number: int) -> str:
    """Hand the job over unless it runs, and wait for its end; ``again`` when it is to be started once more.

    Done over after a crash of the keeper: it looks before it starts anything.
    """
    job = JobFolder(Path(folder))
    try:
        return await _supervisor(job).supervise(job)
    except (
        Exception
    ) as error:  # the last line of defence: a job whose supervisor fails must not wait for ever
        log.exception("job %s", folder)
        write_off(job, f"the keeper failed: {type(error).__name__}: {error}")
        keeper_process.mark(job.path.parent)
        return "over"


def _supervisor(job: JobFolder) -> Supervisor:
    chain = read(job.path.parent / "chain.json") or {}
    key = of_json([chain["backend"], chain["options"]])
    if key not in _supervisors:
        jobs = job.path.parent.parent
        _supervisors[key] = Supervisor(backend_of(chain["backend"], chain["options"], jobs), jobs)
    return _supervisors[key]


class Keeper:
    """The loop around the queue."""

    def __init__(self, jobs: Path) -> None:
        self._jobs = jobs
        self._folder = keeper_process.place(jobs)
        self._inbox = private_folder(self._folder / "inbox")
        self._queues: dict[str, Queue] = {}
        self._active: set[str] = set()

    def run(self) -> None:
        """Work until there was nothing to do for IDLE_S."""
        config = DBOSConfig(
            name="toolkit-jobs",
            system_database_url=f"sqlite:///{self._folder / 'dbos.sqlite'}",
            application_version="1",  # else a new version of the code would not recover what is queued
            executor_id="keeper",
            log_level="WARNING",
            max_executor_threads=8,
            scheduler_polling_interval_sec=3600,
        )
        DBOS(config=config)
        DBOS.launch()
        for name in [c["id"] for c in report.chains(self._jobs) if self._is_ours(c)]:
            self._advance(name)
        busy = time.monotonic()
        while time.monotonic() - busy < IDLE_S:
            marks = [entry.name for entry in self._inbox.iterdir()]
            for name in marks:
                (self._inbox / name).unlink(
                    missing_ok=True
                )  # first: what comes meanwhile is a new mark
                self._advance(name)
            if self._active or marks:
                busy = time.monotonic()
            time.sleep(LOOK_S)

    def _is_ours(self, chain: Mapping[str, Any]) -> bool:
        settled = (self._jobs / chain["id"] / "settled.json").exists()
        return report.needs_keeper(chain) and not settled

    def _advance(self, name: str) -> None:
        """Enqueue the jobs of a chain whose turn has come; end it when all are over."""
        chain = read(self._jobs / name / "chain.json")
        if chain is None:
            return
        try:
            self._enqueue_ready(chain)
            over = settle(self._jobs / name) is not None
        except ToolkitError:
            log.exception("chain %s", name)
            return
        (self._active.discard if over else self._active.add)(name)

    def _enqueue_ready(self, chain: Mapping[str, Any]) -> None:
        reports = report.of_chain(self._jobs, chain)
        succeeded = {one.id for one in reports if one.state is State.succeeded}
        for one in reports:
            job = JobFolder(Path(one.folder))
            spec = job.spec
            if one.state.ended or not succeeded.issuperset(spec.after):
                continue
            queue = self._register(chain, gpus=spec.resources.gpus > 0)
            with SetWorkflowID(f"{spec.id}-r{job.retried['round']}"):
                queue.enqueue(supervise_job, str(job.path))

    def _register(self, chain: Mapping[str, Any], *, gpus: bool = False) -> Queue:
        """The queue of an engine; on this machine one for each kind of place, as long as there are places."""
        name = f"{chain['backend']}-{of_json(chain['options'])[:8]}-{'gpu' if gpus else 'slot'}"
        if name not in self._queues:
            self._queues[name] = DBOS.register_queue(
                name,
                worker_concurrency=_places(chain, gpus=gpus),
                polling_interval_sec=LOOK_S,
                on_conflict="always_update",
            )
        return self._queues[name]


def _places(chain: Mapping[str, Any], *, gpus: bool) -> int:
    if chain["backend"] != "local":
        return AT_ENGINES
    places = Places(LocalSection.model_validate(chain["options"]))
    return max(1, len(places.gpus)) if gpus else places.slots


def main(argv: list[str]) -> int:
    """Keep the jobs of one workspace."""
    jobs = Path(argv[0])
    lock = hold(keeper_process.place(jobs) / "lock")
    if lock is None:
        return 0
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # nothing to tidy up: a kill is the same
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    log.info("keeper %s of %s", os.getpid(), jobs)
    Keeper(jobs).run()
    let_go(lock)
    if any((keeper_process.place(jobs) / "inbox").iterdir()):  # a mark that came in the last moment
        keeper_process.ensure(jobs)
    log.info("nothing to do for %g s", IDLE_S)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
