"""The worker: runs one step from its step file, and is the only one that writes its artifact.

It verifies the inputs, opens the MLflow run, starts the stage as a process in the stage's own
environment, forwards what the stage reports, and when the stage succeeds hashes the files and
renames the folder into place. A crash at any point leaves no artifact; the next run goes on from
the step's state folder.

``python -m toolkit.worker STEP.JSON`` is what a job engine starts; ``toolkit run`` calls
:func:`run_step` itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolkit import __version__, artifact, errors
from toolkit.artifact import Artifact
from toolkit.environments.lockfile import load_lock
from toolkit.stage_process import Outcome, join_stage, left_traceback, run_stage
from toolkit.stages import Kind
from toolkit.tracking import Dataset, GitState, StepRun, Store
from toolkit.train.parallel.launch import NODE
from toolkit.workspace import private_folder

Show = Callable[[str, Mapping[str, Any]], None]
"""Called with the step's name and an event: started, waiting, tick, progress, note, metrics, finished."""

NODES_S = 300.0
"""How long other nodes wait for the first one to check the step's inputs."""

KEPT_STATE = ("log.txt", "step.json", "result.json", "mlflow.json")


@dataclass(frozen=True)
class StepSpec:
    """A step, resolved for one machine: all that a worker needs. Written as ``step.json``."""

    recipe: str
    recipe_path: str
    recipe_dir: str
    step: str
    stage: str
    kind: str
    fingerprint: str
    identity: dict[str, Any]
    config: dict[str, Any]
    inputs: dict[str, str]
    """Role -> folder of a finished artifact."""
    artifact: str
    state: str
    device: str
    environments: dict[str, dict[str, Any]]
    """Logical name -> python, pythonpath, variables, lock, digest; the stage's own first."""
    store: dict[str, Any]
    """MLflow store: uri, artifact_root."""
    experiment: str
    parent_run: str | None
    resume: bool = True
    probe: bool = False
    """Only try out whether it fits; nothing is kept."""
    profile_steps: list[int] | None = None
    """First and last optimizer step to record; changes nothing that is trained, so it is no part of ``identity``."""
    launch: dict[str, Any] = field(default_factory=dict)
    """How many processes the stage is, when more than one (``train/parallel/launch.py``: Launch)."""
    key: str | None = None
    """What names its MLflow run over several attempts (a job's id)."""
    code: dict[str, str] | None = None
    """Commit and diff when it was submitted; taken now unless given."""

    @classmethod
    def read(cls, path: Path) -> StepSpec:
        """Read what :meth:`write` wrote."""
        return cls(**json.loads(path.read_text())["spec"])

    def write(self) -> Path:
        """Write ``step.json`` into the state folder, in the form the stage process reads; return its path."""
        inputs = {role: artifact.verified(Path(path)) for role, path in self.inputs.items()}
        for_stage = {
            "stage": self.stage,
            "config": self.config,
            "inputs": {
                role: {
                    "path": str(a.path),
                    "kind": a.manifest["kind"],
                    "fingerprint": a.fingerprint,
                    "facts": a.manifest["facts"],
                }
                for role, a in inputs.items()
            },
            "output": str(artifact.part_of(Path(self.artifact))),
            "state": self.state,
            "recipe_dir": self.recipe_dir,
            "device": self.device,
            "resume": self.resume,
            "probe": self.probe,
            "profile_steps": self.profile_steps,
            "launch": self.launch,
            "fingerprint": self.fingerprint,
            "interpreters": {
                name: {key: e[key] for key in ("python", "pythonpath", "variables")}
                for name, e in self.environments.items()
            },
        }
        path = private_folder(Path(self.state)) / "step.json"
        part = path.with_suffix(".part")  # nodes of one step read it as soon as it is there
        part.write_text(json.dumps(for_stage | {"spec": asdict(self)}, indent=1))
        part.replace(path)
        return path


def run_step(
    spec: StepSpec, show: Show, left: Callable[[BaseException], bool] = lambda _: False
) -> Artifact:
    """Run one step unless another process made its artifact meanwhile.

    Args:
        spec: The step.
        show: Takes its events.
        left: Whether its MLflow run is left open when it ends by this error, because it will go on.

    Raises:
        ToolkitError: The stage's own error, or StepFailedError when it crashed or was killed.
    """
    final, state = Path(spec.artifact), private_folder(Path(spec.state))
    with _alone(
        state.with_name(state.name + ".lock"), lambda: show(spec.step, {"event": "waiting"})
    ):
        made = artifact.find(final)
        if made is not None and artifact.damage(made) is None:
            return made
        step_file = spec.write()
        if not spec.resume:
            _forget(state, keep=("step.json",))
        _empty(artifact.part_of(final))
        show(spec.step, {"event": "started"})
        with _mlflow_run(spec) as run:
            run.left = left

            def forward(event: Mapping[str, Any]) -> None:
                if event["event"] == "metrics":
                    run.log(event["step"], event["metrics"])
                show(spec.step, event)

            try:
                outcome = run_stage(spec, step_file, forward)
            except errors.ToolkitError:
                run.stage_traceback = left_traceback(state)
                raise
            metrics = outcome.metrics | {
                "seconds": outcome.seconds,
                "peak_memory_gib": outcome.peak_memory_gib,
            }
            run.wait()
            done = artifact.publish(final, _manifest(spec, outcome, run.reference))
            if spec.kind in (Kind.model, Kind.adapter):
                run.model(f"{spec.recipe}-{spec.step}", spec.kind, final, spec.fingerprint)
            run.finish(metrics, final, spec.fingerprint)
        _forget(state, keep=KEPT_STATE)
        show(spec.step, {"event": "finished", "metrics": outcome.metrics})
        return done


def probe_step(spec: StepSpec, show: Show) -> Outcome:
    """Run a step's stage only for what it measures; keep nothing, and no MLflow run of it.

    Raises:
        ToolkitError: The stage's own error; its log stays in the state folder with ``-probe``.
    """
    state, output = private_folder(Path(f"{spec.state}-probe")), f"{spec.artifact}-probe"
    trial = replace(spec, state=str(state), artifact=output, resume=False, probe=True)
    part = artifact.part_of(Path(output))
    _empty(part)
    show(spec.step, {"event": "started"})
    try:
        outcome = run_stage(trial, trial.write(), lambda event: show(spec.step, event))
    finally:
        shutil.rmtree(part)
    shutil.rmtree(state)
    show(spec.step, {"event": "finished", "metrics": outcome.metrics})
    return outcome


def _mlflow_run(spec: StepSpec) -> StepRun:
    """The child run of this step. Nothing here waits for the server."""
    lock = next(iter(spec.environments.values()))["lock"]
    return StepRun.start(
        Store.read(spec.store),
        spec.experiment,
        spec.parent_run,
        spec.step,
        config=spec.config,
        tags={"toolkit.fingerprint": spec.fingerprint, "toolkit.recipe": spec.recipe}
        | _template(spec),
        datasets=_datasets(spec),
        recipe_dir=Path(spec.recipe_dir),
        lock_text=load_lock(lock).text if lock else None,
        key=spec.key,
        code=GitState(**spec.code) if spec.code else None,
    )


def _template(spec: StepSpec) -> dict[str, str]:
    """The hash of the chat template that the step's model brings, as a tag."""
    model = artifact.find(Path(spec.inputs["model"])) if "model" in spec.inputs else None
    digest = model.manifest["facts"].get("template_sha256") if model else None
    return {"toolkit.template": digest} if digest else {}


def _datasets(spec: StepSpec) -> list[Dataset]:
    """What the step reads, as MLflow shows it: files by digest, or the dataset artifact."""
    files = spec.config.get("digests", {}) if spec.stage == "data" else {}
    found = [Dataset(Path(name).name, digest, name, "source") for name, digest in files.items()]
    if "dataset" in spec.inputs:
        made = artifact.find(Path(spec.inputs["dataset"]))
        purpose = {"train": "training", "quantize": "calibration"}.get(spec.stage, "evaluation")
        if made:
            found.append(
                Dataset(spec.recipe, made.fingerprint, str(made.path), purpose, made.metrics)
            )
    return found


def _manifest(spec: StepSpec, outcome: Outcome, run: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "schema": 1,
        "toolkit": __version__,
        "recipe": spec.recipe,
        "step": spec.step,
        "stage": spec.stage,
        "kind": Kind(spec.kind).value,
        "fingerprint": spec.fingerprint,
        "identity": spec.identity,
        "inputs": spec.inputs,
        "environments": {name: e["digest"] for name, e in spec.environments.items()},
        "metrics": outcome.metrics,
        "facts": outcome.facts,
        "seconds": round(outcome.seconds, 2),
        "peak_memory_gib": outcome.peak_memory_gib,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "mlflow": run,
    }


@contextlib.contextmanager
def _alone(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file; the kernel frees it however the holder ends."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    private_folder(folder)


def _forget(state: Path, keep: tuple[str, ...]) -> None:
    """Remove what a finished (or restarted) step no longer needs: checkpoints are large."""
    for entry in state.iterdir():
        if entry.name in keep:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def raise_on_sigterm() -> None:
    """Make SIGTERM end the worker in order: the stage writes a checkpoint, the MLflow run is KILLED.

    Only the first one counts: Slurm tells every process of a job, and the shim then tells the worker again, which
    would cut short the wait for the checkpoint.
    """

    def handler(_signum: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)
        raise errors.Interrupted

    signal.signal(signal.SIGTERM, handler)


def main(argv: list[str]) -> int:
    """Run the step file in ``argv[0]``, with plain progress lines for a job log.

    With ``TOOLKIT_NODE`` above 0 this is another node of a step of several: it lends its processes. As a job it
    does what comes between steps too.
    """
    from toolkit.cli import render
    from toolkit.launch.in_job import InJob

    raise_on_sigterm()
    spec = StepSpec.read(Path(argv[0]))
    job = InJob.here()
    show = render.Progress().show
    try:
        if int(os.environ.get(NODE, "0")) > 0:
            return join_stage(spec, _shared_step_file(spec))
        if job is None:
            run_step(spec, show)
        else:
            job.run(spec, show)
    except errors.ToolkitError as error:
        render.error(error)
        return error.exit_code
    except (errors.Interrupted, KeyboardInterrupt):
        return errors.Interrupted.exit_code
    return 0


def _shared_step_file(spec: StepSpec) -> Path:
    """The step file that the first node writes; nodes begin at about the same time.

    Raises:
        StepFailedError: It did not come.
    """
    path, deadline = Path(spec.state) / "step.json", time.monotonic() + NODES_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise errors.StepFailedError(
                f"step {spec.step}: the first node wrote no {path} in {NODES_S:g} s",
                "nodes need one file system with the same paths; see the first node's log",
            )
        time.sleep(0.2)
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
