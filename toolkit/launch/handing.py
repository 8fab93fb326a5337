"""Giving the jobs of a chain to their engine, in order; done over after a cut, nothing is given twice."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.launch import arrays, keeping
from toolkit.launch.arrays import Array, ArrayBackend
from toolkit.launch.backend import Backend, backend_of
from toolkit.launch.folder import JobFolder, read, write
from toolkit.launch.spec import JobSpec
from toolkit.workspace import private_folder


def hand_over(folder: Path) -> None:
    """Give every job of a chain to its engine that has it not yet, in order.

    Raises:
        TrackingError: The MLflow store did not take the run.
        BackendError: The engine is not there, or refuses.
    """
    chain = read(folder / "chain.json") or {}
    if read(folder / "parent.json") is None:
        _open_parent(folder, chain)
    backend = backend_of(chain["backend"], chain["options"], folder.parent)
    if not backend.ordered:
        keeping.ask(folder)
        return
    ids: dict[str, str] = {}
    for name in chain["jobs"]:
        job = JobFolder(folder / name)
        known = job.submitted
        ids[name] = str(known["id"]) if known else give(job, backend, ids)


def hand_over_array(folders: Sequence[Path], parallel: int) -> None:
    """Give the jobs of several chains of one profile to their engine, those of equal shape as arrays.

    For engines that take arrays; chains that are like no other, and engines without, get them singly. Done over after
    a cut, nothing is given twice.

    Args:
        folders: The chains' folders; their order is that of the tasks.
        parallel: How many tasks of each array may run at once.

    Raises:
        TrackingError: The MLflow store did not take a run.
        BackendError: The engine is not there, or refuses.
    """
    if not folders:
        return
    jobs, chain = folders[0].parent, read(folders[0] / "chain.json") or {}
    backend = backend_of(chain["backend"], chain["options"], jobs)
    if isinstance(backend, ArrayBackend):
        _give_arrays(folders, backend, parallel)
    for folder in folders:
        hand_over(folder)


def _give_arrays(folders: Sequence[Path], backend: ArrayBackend, parallel: int) -> None:
    """Of chains that are at least two of a shape; the others stay."""
    chains = []
    for folder in folders:
        chain = read(folder / "chain.json") or {}
        if read(folder / "parent.json") is None:
            _open_parent(folder, chain)
        chains.append([JobFolder(folder / name).spec for name in chain["jobs"]])
    ids = _handed_over([job for chain in chains for job in chain], backend)
    for group in arrays.alike(chains, ids):
        if len(group) == 1:
            continue
        for array in arrays.arrays(group, ids, parallel):
            _keep(array, backend.render_array(array), folders[0].parent)
            given = backend.submit_array(array)
            for job in array.tasks.values():
                _write_down(JobFolder(Path(job.folder)), given[job.id])
            ids |= given


def _handed_over(jobs: Sequence[JobSpec], backend: ArrayBackend) -> dict[str, str]:
    """Engine ids of the jobs that were given before, also of those that nobody wrote down."""
    written = {job.id: JobFolder(Path(job.folder)).submitted for job in jobs}
    ids = {name: str(one["id"]) for name, one in written.items() if one}
    return ids | dict(backend.found([job for job in jobs if job.id not in ids]))


def _keep(array: Array, text: str, jobs: Path) -> None:
    """Say in every job's folder which task of which array it is, before any engine knows: so it is found again."""
    (private_folder(jobs / "arrays") / f"{array.name}.sh").write_text(text)
    for task, job in array.tasks.items():
        known = {"name": array.name, "task": task, "round": arrays.round_of(job)}
        write(Path(job.folder) / "array.json", known)


def give(job: JobFolder, backend: Backend, ids: dict[str, str]) -> str:
    """Submit one job and write down the engine's id."""
    spec = job.spec
    after = {name: ids[name] for name in spec.after if name in ids}
    text = backend.render(spec, after)
    engine_id = str(backend.submit(spec, after))
    _write_down(job, engine_id, text)
    return engine_id


def _write_down(job: JobFolder, engine_id: str, text: str = "") -> None:
    """The engine's id, with what was sent: ``text``, or the script of the array that it is a task of."""
    array = job.array
    task = array and engine_id.partition("@")[0].endswith(f"_{array['task']}")
    sent = {"array": array["name"]} if array and task else {"text": text}
    job.write("submitted.json", {"id": engine_id, "at": time.time(), **sent})


def _open_parent(folder: Path, chain: dict[str, Any]) -> None:
    """The MLflow run of the chain, with the steps that were done before; a second try finds the first one's."""
    from toolkit.between import Course
    from toolkit.launch.chain import TrialOf
    from toolkit.tracking import RecipeRun, Store

    course = Course.read(chain["course"])
    course.begin()
    tags = {"toolkit.chain": chain["id"], "toolkit.profile": chain["profile"]}
    trial = TrialOf(**chain["trial"]) if chain.get("trial") else None
    name = f"{chain['recipe']} {trial.number}" if trial else None
    tags |= trial.tags if trial else {}
    path = Path(course.recipe_path)
    store = Store.read(chain["store"])
    try:
        parent = RecipeRun.start(
            store, chain["experiment"], course.recipe, path, tags, key=chain["id"], name=name
        )
    except ToolkitError:
        shutil.rmtree(folder)  # no engine knows of it yet
        raise
    steps = set(chain["jobs"].values())
    made = course.made
    for place in course.steps:
        if place.name not in steps and place.name in made:
            course.step_done(place.name, made, parent, cached=True)
    parent.leave()
    write(folder / "parent.json", {"parent_run": parent.run_id})
