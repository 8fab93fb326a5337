"""Giving the jobs of a chain to their engine, in order; done over after a cut, nothing is given twice."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.launch import keeping
from toolkit.launch.backend import Backend, backend_of
from toolkit.launch.folder import JobFolder, read, write


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


def give(job: JobFolder, backend: Backend, ids: dict[str, str]) -> str:
    """Submit one job and write down the engine's id."""
    spec = job.spec
    after = {name: ids[name] for name in spec.after if name in ids}
    text = backend.render(spec, after)
    engine_id = str(backend.submit(spec, after))
    job.write("submitted.json", {"id": engine_id, "at": time.time(), "text": text})
    return engine_id


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
