"""MLflow runs of ours: one parent per recipe run, one child per step.

Every call here only writes to disk. The one exception is :meth:`RecipeRun.start`, which waits until
the parent exists: children name it, and a store that cannot take a run should stop the work before
it costs anything.
"""

from __future__ import annotations

import getpass
import json
import math
import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from toolkit.errors import TrackingError
from toolkit.tracking.describe import Dataset, GitState, flatten, git_state
from toolkit.tracking.forward import Forwarder
from toolkit.tracking.outbox import Outbox
from toolkit.tracking.replay import sync
from toolkit.tracking.store import Store
from toolkit.tracking.system import SystemSampler
from toolkit.tracking.uploads import small_files

START_S = 90.0
"""How long the first run may take: MLflow is imported and a new SQLite store gets its tables, which
took 29 s on a busy machine with two cores."""

CLOSE_S = 10.0
"""How long the end of a run waits for the store before it leaves the rest to a later replay."""

TAG_LIMIT = 5000
"""Characters of an error that fit into a tag."""


class TrackedRun:
    """A run whose story is written to disk first and carried to MLflow in the background."""

    def __init__(
        self,
        store: Store,
        experiment: str,
        name: str,
        tags: Mapping[str, str],
        key: str | None = None,
        *,
        again: bool = False,
    ) -> None:
        """Open a run.

        Args:
            store: Where to.
            experiment: Name of the experiment.
            name: Name of the run.
            tags: Tags.
            key: What names the run for ever, where other processes go on with it (:meth:`leave`).
            again: Whether an earlier process may have opened it under this key.
        """
        self.store = store
        root = store.outboxes
        self._outbox = Outbox.keyed(root, key) if key else Outbox.create(root, name)
        if self._outbox.empty():
            own = {"toolkit.key": key or self._outbox.folder.name, "mlflow.user": _user()}
            self._outbox.put(
                "create",
                store=store.described(),
                experiment=experiment,
                name=name,
                start_ms=_now_ms(),
                tags=own | dict(tags),
                again=again,
            )
        else:
            self._outbox.put("again")
        self._forwarder = Forwarder(self._outbox, store)
        self._finished = False
        self.left: Callable[[BaseException], bool] = lambda _: False
        """Whether a process that ends by this error leaves the run to another try."""
        self.stage_traceback: str | None = None
        """Set it where the error that ends the run was raised in another process."""

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; ``None`` until the store gave one."""
        return self._forwarder.run_id

    @property
    def reference(self) -> dict[str, str | None]:
        """What a manifest says about this run."""
        return {"run_id": self.run_id, "store": self.store.shown}

    def wait(self, timeout_s: float = CLOSE_S) -> str | None:
        """Wait until the store gave an id: a short step may end before MLflow is imported."""
        return self._forwarder.wait_for_run(timeout_s)

    @property
    def lost(self) -> str | None:
        """Why the store does not get what is recorded now; ``None`` while it does."""
        return None if self._forwarder.lost is None else str(self._forwarder.lost)

    def log(
        self,
        step: int,
        metrics: Mapping[str, Any],
        time_s: float | None = None,
        *,
        of_model: bool = False,
    ) -> None:
        """Record metrics at a step; values that are no numbers are left out."""
        numbers = {_key(k): float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        if numbers and not self._finished:
            ms = _now_ms() if time_s is None else int(time_s * 1000)
            self._outbox.put("metrics", step=step, ms=ms, metrics=numbers, of_model=of_model)

    def params(self, config: Mapping[str, Any]) -> None:
        """Record settings: dotted parameters, and the whole as ``config.json``."""
        self.text("config.json", json.dumps(config, indent=2, default=str))
        self._outbox.put("params", params={_key(k): v for k, v in flatten(config).items()})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Record tags."""
        self._outbox.put("tags", tags=dict(tags))

    def inputs(self, datasets: Sequence[Dataset]) -> None:
        """Record the datasets that the run read."""
        if datasets:
            given = [
                vars(d) | {"profile": json.dumps(d.profile) if d.profile else None}
                for d in datasets
            ]
            self._outbox.put("inputs", datasets=given)

    def text(self, name: str, text: str) -> None:
        """Record a text as an artifact."""
        self.file(self._outbox.keep_text(name, text))

    def file(self, path: Path, folder: str = "") -> None:
        """Record a file as an artifact, under ``folder``; it is read when it is sent."""
        self._outbox.put("file", path=str(path.absolute()), folder=folder)

    def code(self, state: GitState | None) -> None:
        """Record commit and diff, where there is a repository."""
        if state is not None:
            self.tag(state.tags)
            if state.diff:
                self.text("git.diff", state.diff)

    def fail(self, error: BaseException) -> None:
        """End the run as FAILED with the traceback; KILLED when somebody stopped it; leave it to another try."""
        if self.left(error):
            self.leave("SCHEDULED")
            return
        if not isinstance(error, Exception):
            self._end("KILLED")
            return
        self.tag({"toolkit.error": f"{type(error).__name__}: {error}"[:TAG_LIMIT]})
        shown = self.stage_traceback or "".join(traceback.format_exception(error))
        self.text("traceback.txt", shown)
        self._end("FAILED")

    def leave(self, status: str | None = None) -> None:
        """Go away without ending the run: another process will go on with it.

        Args:
            status: What MLflow shows meanwhile (``SCHEDULED``); as it is unless given.
        """
        self._close("leave", status=status)

    def _end(self, status: str, at: float | None = None) -> None:
        self._close("finish", status=status, ms=_now_ms() if at is None else int(at * 1000))

    def _close(self, word: str, **values: Any) -> None:
        if self._finished:
            return
        self._finished = True
        self._outbox.put(word, **values)
        if self._forwarder.close(CLOSE_S):
            self._outbox.remove()
        else:
            self._outbox.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self.fail(error)
        else:
            self._end("FINISHED")


class RecipeRun(TrackedRun):
    """The parent of one ``toolkit run``; its ``with`` is the run's life.

    What earlier runs could not deliver is replayed in the background meanwhile.
    """

    @classmethod
    def start(
        cls,
        store: Store,
        experiment: str,
        recipe: Mapping[str, Any],
        recipe_path: Path,
        tags: Mapping[str, str],
        *,
        key: str | None = None,
        name: str | None = None,
    ) -> Self:
        """Open the parent run of ``recipe`` (the resolved recipe, as JSON values), named ``name`` or as the recipe.

        With ``key`` other processes can go on with it, and a second try at opening it finds the first one.

        Raises:
            TrackingError: The store did not take the run.
        """
        title = str(recipe.get("name", recipe_path.stem))
        own = {
            "toolkit.kind": "recipe",
            "toolkit.recipe": title,
            "mlflow.source.name": str(recipe_path),
        }
        run = cls(store, experiment, name or title, own | dict(tags), key, again=key is not None)
        if run._forwarder.wait_for_run(START_S) is None:
            run._abandon()
        run.params(recipe)
        if recipe_path.is_file():
            run.file(recipe_path)
        run.code(git_state(recipe_path.parent))
        run._replay()
        return run

    @classmethod
    def again(cls, store: Store, experiment: str, name: str, key: str) -> Self:
        """Go on with the run that :meth:`start` opened under ``key``, perhaps in another process."""
        return cls(store, experiment, name, {}, key, again=True)

    def step_done(
        self, step: str, metrics: Mapping[str, float], run_id: str | None, *, cached: bool
    ) -> None:
        """Show a step's metrics on the parent's page, as ``<step>.<metric>``, and link the child.

        A cached step has no child under this parent: the link leads to the run that did the work.
        """
        self.log(0, {f"{step}.{key}": value for key, value in metrics.items()})
        self.tag({f"toolkit.step.{step}": run_id or ""})
        if cached:
            self.tag({f"toolkit.cached.{step}": "true"})

    def end(self, status: str, at: float | None = None) -> None:
        """End the run, whatever became of the whole: ``FINISHED``, ``FAILED``, ``KILLED``; now, or as of a time."""
        self._end(status, at)

    def _replay(self) -> threading.Thread:
        """Deliver in the background what ended runs left behind."""
        thread = threading.Thread(
            target=sync, args=(self.store.outboxes,), name="mlflow-replay", daemon=True
        )
        thread.start()
        return thread

    def _end(self, status: str, at: float | None = None) -> None:
        self._replay().join(CLOSE_S)  # short steps end before MLflow is imported
        super()._end(status, at)

    def _abandon(self) -> None:
        cause = self.lost or f"no answer in {START_S:g} s"
        self._forwarder.close(0)
        self._outbox.remove()
        if isinstance(self._forwarder.lost, TrackingError):
            raise self._forwarder.lost
        raise TrackingError(
            f"tracking store {self.store.shown} did not take the run: {cause}",
            "look into the server's log, or name another store by tracking.uri",
        )


class StepRun(TrackedRun):
    """The child run of one step. In a ``with``, an exception ends it FAILED, a stop KILLED."""

    @classmethod
    def start(
        cls,
        store: Store,
        experiment: str,
        parent_id: str | None,
        step: str,
        *,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        datasets: Sequence[Dataset] = (),
        recipe_dir: Path | None = None,
        lock_text: str | None = None,
        key: str | None = None,
        code: GitState | None = None,
    ) -> Self:
        """Open the child run; returns at once, whether the store answers or not.

        Args:
            store: Where to.
            experiment: Name of the experiment.
            parent_id: Run id of the recipe run, if there is one.
            step: Name of the step, e.g. ``evaluate-tuned``.
            config: The stage's resolved config, nested.
            tags: More tags; ``toolkit.fingerprint`` and ``toolkit.template`` are good ones.
            datasets: What the step reads.
            recipe_dir: Folder whose repository's commit and diff are recorded.
            lock_text: The environment's lock, kept as ``environment.lock.txt``.
            key: What names the run over several attempts of a job: each goes on with the same one.
            code: Commit and diff, where they were taken before; else those of ``recipe_dir``.
        """
        own = {"toolkit.kind": "step", "toolkit.step": step}
        if parent_id:
            own["mlflow.parentRunId"] = parent_id
        run = cls(store, experiment, step, own | dict(tags), key, again=key is not None)
        run._sampler = SystemSampler(run.log)
        run.params(config)
        run.inputs(datasets)
        state = code or (git_state(recipe_dir) if recipe_dir is not None else None)
        run.code(state)
        if lock_text is not None:
            run.text("environment.lock.txt", lock_text)
        return run

    _sampler: SystemSampler

    @property
    def peak_gib(self) -> float:
        """Largest resident memory so far of all processes under this one."""
        return self._sampler.peak_gib

    def model(self, name: str, kind: str, folder: Path, fingerprint: str) -> None:
        """Record the step's artifact as a logged model: a link with lineage, no copy of weights."""
        tags = {"toolkit.artifact": str(folder), "toolkit.fingerprint": fingerprint}
        self._outbox.put("model", name=name, model_type=kind, tags=tags)

    def finish(
        self, metrics: Mapping[str, float], artifact: Path | None = None, fingerprint: str = ""
    ) -> None:
        """End the run: final metrics, small files of the artifact, a link to the rest."""
        self._sampler.stop()
        self.log(0, metrics, of_model=True)
        if artifact is not None:
            self.tag({"toolkit.artifact": str(artifact), "toolkit.fingerprint": fingerprint})
            for path in small_files(artifact):
                self.file(path, str(Path("artifact") / path.relative_to(artifact).parent))
        self._end("FINISHED")

    def _close(self, word: str, **values: Any) -> None:
        self._sampler.stop()
        super()._close(word, **values)


def _key(name: str) -> str:
    """A name as MLflow takes it: letters, digits and ``_ - . / :`` and blank, at most 250."""
    return re.sub(r"[^\w\-./: ]", "_", name)[:250]


def _now_ms() -> int:
    return math.floor(time.time() * 1000)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
