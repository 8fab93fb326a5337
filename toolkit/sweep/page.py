"""What MLflow shows of a sweep: a run with a curve over the trials, their runs below it, the best one marked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

from toolkit.between import Course
from toolkit.errors import GateFailedError
from toolkit.launch.chain import TrialOf
from toolkit.prepare import Prepared
from toolkit.sweep.folder import SweepFolder, Trial
from toolkit.tracking import RecipeRun, Store


class Page:
    """The MLflow run of a sweep, gone on with by whichever driver sees it through."""

    def __init__(self, folder: SweepFolder) -> None:
        """Open the run, or go on with it.

        Raises:
            TrackingError: The store did not take it.
        """
        asked = folder.asked
        self._folder, self._experiment = folder, asked["experiment"]
        self._store, self._metric = Store.read(asked["store"]), asked["metric"]
        self._run = RecipeRun.start(
            self._store,
            self._experiment,
            {"name": asked["name"], "sweep": asked["section"]},
            Path(asked["snapshot"]),
            {
                "toolkit.kind": "sweep",
                "toolkit.sweep": folder.id,
                "toolkit.sweep.goal": f"{asked['goal']} {asked['metric']} of {asked['step']}",
            },
            key=folder.id,
            name=f"{asked['name']} sweep",
        )

    def of(self, trial: Trial) -> TrialOf:
        """Where a trial's own run belongs."""
        return TrialOf(self._folder.id, trial.number, self._run.run_id)

    def ended(self, trial: Trial, best: Trial | None) -> None:
        """Draw a trial's point, and the best value up to now."""
        points = {} if trial.value is None else {self._metric: trial.value}
        if best and best.value is not None:
            points[f"best {self._metric}"] = best.value
        self._run.log(trial.number, points)

    def done_before(self, trial: Trial, prepared: Prepared) -> tuple[str | None, str | None]:
        """Make the run of a trial all of whose steps were there already; its id, and which gate failed."""
        recipe, belongs = prepared.loaded.recipe, self.of(trial)
        course = belongs.course(Course.of(prepared))
        run = RecipeRun.start(
            self._store,
            self._experiment,
            recipe.model_dump(mode="json"),
            prepared.loaded.path,
            belongs.tags,
            key=self._key(trial),
            name=f"{recipe.name} {trial.number}",
        )
        made = course.made
        try:
            for place in course.steps:
                course.step_done(place.name, made, run, cached=True)
        except GateFailedError as error:
            run.tag({"toolkit.error": error.message[:5000]})
            run.end("FAILED")
            return run.run_id, error.message
        run.end("FINISHED")
        return run.run_id, None

    def mark(self, trial: Trial, *, best: bool) -> None:
        """Mark a trial's own run, which is over, as the best; or no longer."""
        name = f"{self._folder.asked['name']} {trial.number}"
        run = RecipeRun.again(self._store, self._experiment, name, self._key(trial))
        run.tag({"toolkit.best": str(best).lower()})
        run.end("FINISHED", trial.ended)

    def close(self, status: str, best: Trial | None, trials: Sequence[Trial]) -> None:
        """End the run."""
        if best:
            self._run.tag(
                {
                    "toolkit.best.trial": str(best.number),
                    "toolkit.best.run": best.run or "",
                    "toolkit.best.command": self._folder.command(best),
                }
                | {f"toolkit.best.{key}": json.dumps(value) for key, value in best.values.items()}
            )
        self._run.text("trials.json", json.dumps([asdict(one) for one in trials], indent=1))
        self._run.end(status)

    def leave(self) -> None:
        """Go away; another driver goes on."""
        self._run.leave()

    def _key(self, trial: Trial) -> str:
        return trial.chain or f"{self._folder.id}-{trial.number:04d}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()  # does nothing after close
