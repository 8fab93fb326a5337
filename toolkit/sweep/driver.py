"""The driver: ``python -m toolkit.sweep.driver FOLDER``, one process for each sweep that is not over.

It keeps so many chains of jobs under way as the sweep allows, reads what ended ones measured, chooses the next values,
and marks the best. What it knows is in the sweep's folder; killed at any moment, the next one goes on.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.errors import BackendError, BusyError, LimitError, ToolkitError, UsageError
from toolkit.launch import keeping, orders, profiles, report
from toolkit.launch.arrays import ArrayBackend
from toolkit.launch.backend import backend_of
from toolkit.launch.chain import How
from toolkit.launch.folder import read, write
from toolkit.launch.holding import hold
from toolkit.launch.profiles import LimitsSection
from toolkit.launch.report import JobReport
from toolkit.launch.settle import settle
from toolkit.launch.states import State
from toolkit.launch.submit import go_on, submit_together
from toolkit.sweep import space
from toolkit.sweep.folder import SweepFolder, Trial
from toolkit.sweep.page import Page
from toolkit.sweep.plans import Plans, TrialPlan
from toolkit.sweep.space import Told

LOOK_S = 1.0
"""Between two looks at jobs on this machine."""
ASK_S = 5.0
"""Between two questions to an engine."""
log = logging.getLogger("toolkit.sweep")


class Driver:
    """Sees one sweep to its end."""

    def __init__(self, folder: SweepFolder, page: Page) -> None:
        self._folder, self._page = folder, page
        self._asked = folder.asked
        self._trials = {one.number: one for one in folder.trials}
        self._plans = Plans(folder)
        self._pause_s = LOOK_S
        where = profiles.load(self._asked["profile"])
        takes = isinstance(backend_of(where.backend, where.options, folder.jobs), ArrayBackend)
        known = folder.section.method != "optuna"
        self._arrays = takes and known and where.limits == LimitsSection()  # else one by one
        self._adopt()

    def run(self) -> None:
        """Work until every trial is over, or somebody ends the sweep.

        Raises:
            LimitError: The profile allows no more, and nothing is under way that could change this.
            BackendError: The engine is not there, and nothing is under way.
        """
        while not self._folder.cancelled:
            begun = time.monotonic()
            self._collect()
            self._fill()
            if all(one.state.ended for one in self._trials.values()) and not self._left():
                break
            took = time.monotonic() - begun  # a sweep of a thousand trials must be no load
            time.sleep(max(self._pause_s, min(ASK_S, took)))
        if self._folder.cancelled:
            self._cancel()
        self._finish()

    def _adopt(self) -> None:
        """Go on with chains of ours that were written by a driver that was killed before it could say so."""
        chains = report.chains(self._folder.jobs)
        known = {
            c["trial"]["number"]: c["id"]
            for c in chains
            if (c.get("trial") or {}).get("sweep") == self._folder.id
        }
        waiting = [one for one in self._trials.values() if one.state is State.queued]
        ours = [one for one in waiting if one.chain is None and one.number in known]
        folders = [self._folder.jobs / known[one.number] for one in ours]
        go_on(folders, self._folder.section.parallel)
        for one in ours:
            self._begun(one, known[one.number])

    @property
    def _running(self) -> list[Trial]:
        return [one for one in self._trials.values() if one.state is State.running]

    def _keep(self, trial: Trial) -> Trial:
        self._trials[trial.number] = trial
        if trial.state is not State.queued:
            self._plans.forget(trial)
        return self._folder.keep(trial)

    def _left(self) -> int:
        """Trials that optuna has not chosen yet."""
        section = self._folder.section
        return (section.trials or 0) - len(self._trials) if section.method == "optuna" else 0

    # --- starting -----------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Start what may start: all at once where the engine bounds how many run, else one after the other."""
        while self._begin() and not self._arrays:
            pass

    def _begin(self) -> bool:
        """Whether a trial was started, or found to need no start."""
        section, batch = self._folder.section, list[TrialPlan]()
        room = len(self._running) < section.parallel or self._arrays
        making, over = self._plans.in_the_making(self._running), False
        for trial in self._queue() if room and not self._folder.cancelled else ():
            plan = self._take_up(trial)
            if plan is None:
                over = True
            elif shared := [name for place, name in plan.todo.items() if place in making]:
                self._wait(trial, f"another trial makes {', '.join(shared)} for it")
            else:
                batch.append(plan)
                making |= plan.todo.keys()
            if (batch or over) and not self._arrays:
                break
        return self._submit(batch) if batch else over

    def _queue(self) -> Iterator[Trial]:
        queued = [one for one in self._trials.values() if one.state is State.queued]
        yield from queued
        if not queued and self._left() > 0:
            told = [Told(one.values, one.value, one.state.ended) for one in self._trials.values()]
            minimize = self._asked["goal"] == "minimize"
            values = space.suggested(self._folder.section, told, minimize=minimize)
            yield self._keep(Trial(len(self._trials) + 1, values))

    def _take_up(self, trial: Trial) -> TrialPlan | None:
        """The plan of a trial; ``None`` where it needs no new chain."""
        if trial.chain is not None:
            self._again(trial, trial.chain)
            return None
        try:
            plan = self._plans.of(trial)
        except ToolkitError as error:  # values of optuna are not all known before
            self._end(trial, State.failed, None, error.message)
            return None
        if plan.todo:
            return plan
        run, failed = self._page.done_before(trial, plan.prepared)
        step = plan.prepared.plan.step(self._asked["step"])
        value, missing = self._plans.measured(plan.place(step))
        why = failed or missing
        state = State.failed if why else State.succeeded
        self._end(replace(trial, run=run, at=time.time()), state, value, why)
        return None

    def _submit(self, batch: Sequence[TrialPlan]) -> bool:
        plans = [(one.prepared, one.statuses, self._page.of(one.trial)) for one in batch]
        try:
            made = submit_together(plans, How(), self._folder.section.parallel)
        except BusyError as error:
            return self._wait(batch[0].trial, error.message)
        except (LimitError, BackendError) as error:
            if not self._running:
                raise
            return self._wait(batch[0].trial, error.message)
        for one, chain in zip(batch, made, strict=True):
            self._begun(one.trial, chain.id)
        return True

    def _wait(self, trial: Trial, reason: str) -> bool:
        if trial.reason != reason:
            self._keep(replace(trial, reason=reason))
        return False

    def _begun(self, trial: Trial, chain: str) -> None:
        log.info("trial %s: %s", trial.number, chain)
        begun = replace(trial, state=State.running, chain=chain, reason=None)
        self._keep(replace(begun, at=time.time(), ended=None))

    def _again(self, trial: Trial, name: str) -> None:
        """A trial that failed or was cancelled, and is wanted again: its chain goes on."""
        chain = read(self._folder.jobs / name / "chain.json")
        if chain is None:
            self._keep(replace(trial, chain=None))
            return
        try:
            orders.retry(self._folder.jobs, chain)
        except UsageError as error:  # somebody did already
            log.info("trial %s: %s", trial.number, error.message)
        self._begun(trial, name)

    # --- ending -------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Take in what became of the chains that are over."""
        jobs, by = self._folder.jobs, {str(one.chain): one for one in self._running}
        chains = [chain for name in by if (chain := read(jobs / name / "chain.json"))]
        for name in by.keys() - {chain["id"] for chain in chains}:
            self._end(by[name], State.failed, None, f"{jobs / name} is gone")
        self._pause_s = LOOK_S if all(c["backend"] == "local" for c in chains) else ASK_S
        try:
            reports = orders.look(jobs, chains)
        except BackendError as error:  # the next time
            log.warning("%s", error.message)
            return
        for chain in chains:
            ours = [one for one in reports if one.chain == chain["id"]]
            if all(one.state.ended for one in ours):
                settle(jobs / chain["id"])
                self._take(by[chain["id"]], chain, ours)
            elif report.needs_keeper(chain):
                keeping.ensure(jobs)

    def _take(self, trial: Trial, chain: dict[str, Any], reports: Sequence[JobReport]) -> None:
        places = {step["name"]: step["artifact"] for step in chain["course"]["steps"]}
        value, missing = self._plans.measured(places[self._asked["step"]])
        state = report.state_of(reports)
        why = next((one for one in reports if one.state in (State.failed, State.cancelled)), None)
        reason = f"{why.step}: {why.reason or why.cause}" if why else missing
        run = (read(self._folder.jobs / chain["id"] / "parent.json") or {}).get("parent_run")
        failed = State.failed if missing else State.succeeded
        self._end(
            replace(trial, run=run), failed if state is State.succeeded else state, value, reason
        )

    def _end(self, trial: Trial, state: State, value: float | None, reason: str | None) -> None:
        over = replace(trial, state=state, value=value, reason=reason, ended=time.time())
        log.info("trial %s: %s %s %s", over.number, state.value, value, reason or "")
        best = self._folder.best([*self._trials.values(), over])
        self._page.ended(over, best)  # before it is written down: a point twice is better than none
        self._keep(over)

    def _cancel(self) -> None:
        wanted: dict[str, list[str]] = {}
        for one in self._running:
            chain = read(self._folder.jobs / str(one.chain) / "chain.json")
            wanted |= {chain["id"]: list(chain["jobs"])} if chain else {}
        orders.cancel(self._folder.jobs, wanted)
        self._collect()
        for one in self._trials.values():
            if not one.state.ended:
                self._end(one, State.cancelled, None, "the sweep was cancelled")

    def _finish(self) -> None:
        trials = list(self._trials.values())
        best = self._folder.best(trials)
        before = (read(self._folder.path / "before.json") or {}).get("best")
        if before and (best is None or before != best.number):
            self._page.mark(self._trials[before], best=False)
        if best:
            self._page.mark(best, best=True)
        status = "KILLED" if self._folder.cancelled else "FINISHED" if best else "FAILED"
        self._page.close(status, best, trials)
        result = {"status": status, "best": best.number if best else None, "at": time.time()}
        write(self._folder.path / "result.json", result)


def drive(folder: SweepFolder) -> int:
    """See a sweep to its end, or write down why that is not possible now; the exit code."""
    try:
        with Page(folder) as page:
            Driver(folder, page).run()
    except ToolkitError as error:
        log.exception("stopped")
        said = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        write(folder.path / "stopped.json", said)
        return error.exit_code
    except Exception as error:  # the last line of defence: else it would be started again for ever
        log.exception("stopped")
        message = f"the sweep's driver failed: {type(error).__name__}: {error}"
        hint = f"look into {folder.path / 'driver.log'}"
        write(folder.path / "stopped.json", {"message": message, "hint": hint, "exit_code": 1})
        return 1
    return 0


def main(argv: list[str]) -> int:
    """Drive the sweep whose folder is given, unless somebody does."""
    folder = SweepFolder(Path(argv[0]))
    if hold(folder.lock) is None or folder.result:
        return 0
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # there is nothing to tidy up
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    log.info("driver %s", os.getpid())
    return drive(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
