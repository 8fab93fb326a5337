"""A worker that runs as a job: what it does more than run its step.

The same MLflow run over all attempts, the snapshot instead of files that may have changed, why it failed, and what
comes between the steps of a run (``between.py``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from toolkit import artifact, digests, errors
from toolkit.artifact import Artifact
from toolkit.between import Course
from toolkit.launch import causes, costs
from toolkit.launch.folder import Attempt, JobFolder, read, write
from toolkit.launch.retries import again
from toolkit.launch.states import Cause
from toolkit.recipe.paths import resolve_path
from toolkit.tracking import RecipeRun, Store
from toolkit.worker import Show, StepSpec, run_step


@dataclass(frozen=True)
class InJob:
    """The job that this process is."""

    attempt: Attempt
    job: JobFolder
    oom_kills: int
    """Processes that the kernel had ended for want of memory before this one began."""

    @classmethod
    def here(cls) -> Self | None:
        """From the variable that the shim sets; ``None`` outside jobs."""
        given = os.environ.get("TOOLKIT_ATTEMPT")
        if not given:
            return None
        return cls(Attempt(Path(given)), JobFolder(Path(given).parent.parent), causes.oom_kills())

    @property
    def chain(self) -> dict[str, Any]:
        """``chain.json``, and ``parent`` once the MLflow run is known."""
        folder = self.job.path.parent
        return (read(folder / "chain.json") or {}) | (read(folder / "parent.json") or {})

    def run(self, spec: StepSpec, show: Show) -> None:
        """Run the step and what follows it; on failure leave the cause.

        Raises:
            ToolkitError: The step's own error, or a gate's.
        """
        first = self.attempt.number == 1
        spec = replace(
            spec, parent_run=self.chain.get("parent_run"), resume=spec.resume or not first
        )
        try:
            self._unchanged(spec)
            made = run_step(spec, show, self.left)
            self._after(spec, made)
        except errors.ToolkitError as error:
            cause = self._cause(error)
            write(
                self.attempt.folder / "said.json",
                {"type": type(error).__name__, "message": error.message, "hint": error.hint}
                | {"cause": cause.value},
            )
            raise

    def left(self, error: BaseException) -> bool:
        """Whether the step's MLflow run stays open, because another attempt will go on with it."""
        if self.job.cancelled:
            return False
        if isinstance(error, errors.ToolkitError):
            cause = self._cause(error)
        else:
            cause = Cause.preempted if isinstance(error, errors.Interrupted) else Cause.failed
        begun = (self.attempt.started or {})["at"]
        end = {"cause": cause.value, "kept": self.job.kept_since(begun)}
        return again(self.job.spec, [*self.job.ends[:-1], end])

    def _cause(self, error: errors.ToolkitError) -> Cause:
        return causes.of_error(error, causes.oom_kills() > self.oom_kills)

    def _unchanged(self, spec: StepSpec) -> None:
        """Refuse to make something of files that are not those that were submitted."""
        for text, digest in spec.config.get("digests", {}).items():
            path = resolve_path(text, Path(spec.recipe_dir))
            if not path.exists():
                raise errors.DriftError(
                    f"step {spec.step}: {path} was there when it was submitted, and is gone",
                    "put it back and `toolkit jobs retry`, or submit anew",
                )
            if (now := digests.of_path(path)) != digest:
                raise errors.DriftError(
                    f"step {spec.step}: {path} changed since it was submitted: "
                    f"{digest[:12]}… -> {now[:12]}…",
                    "submit anew: the job is for the file as it was",
                )

    def _after(self, spec: StepSpec, made: Artifact) -> None:
        """Record the step on the run's page and check gates, once; the last step ends the run.

        Who fails here decides nothing for the whole: ``settle.py`` does.
        """
        chain = self.chain
        course = Course.read(chain["course"])
        finished = _upto(course, spec.step) | {spec.step: made}
        last = spec.step == course.steps[-1].name
        parent = parent_run(chain)
        try:
            if read(self.job.path / "recorded.json") is None:
                course.step_done(spec.step, finished, parent, cached=False)
                parent.log(0, {f"{spec.step}.gpu_hours": costs.gpu_hours(self.job)})
                write(self.job.path / "recorded.json", {"artifact": str(made.path)})
            if last:
                course.end(finished)
                parent.log(0, {"gpu_hours": costs.of_chain(self.job.path.parent)})
                write(self.job.path.parent / "settled.json", {"status": "FINISHED"})
                parent.end("FINISHED")
        finally:
            parent.leave()


def parent_run(chain: Mapping[str, Any]) -> RecipeRun:
    """The MLflow run of the whole chain, gone on with in this process."""
    store = Store.read(chain["store"])
    return RecipeRun.again(
        store, chain["experiment"], chain["course"]["recipe"]["name"], chain["id"]
    )


def _upto(course: Course, step: str) -> dict[str, Artifact]:
    """Artifacts of the steps before one."""
    names = [place.name for place in course.steps]
    before = course.steps[: names.index(step)]
    found = ((place.name, artifact.find(Path(place.artifact))) for place in before)
    return {name: one for name, one in found if one is not None}
