"""The demo task reaches the same held-out score by the fast path as by the plain one; LoRA and QLoRA.

Nine parts: the base is scored, and the demo is trained and scored in four ways with two seeds. Each part leaves
``PART.json`` in the folder that ``TOOLKIT_GPU_QUALITY`` names; a part that is there is not run again, and one that was
cut off goes on in its own workspace beside it. ``host.py`` says which variables name the model and the profile.
Several side by side, each in a process of its own, and then the comparison, which only reads::

    test=tests/gpu/test_train_quality_on_gpu.py
    CUDA_VISIBLE_DEVICES=1 python3 -m pytest -m gpu $test -k "part and tickets-qlora-auto-1]"
    python3 -m pytest -m gpu $test -k heldout

``TOOLKIT_GPU_DRY=1`` runs all of it on any machine with a few rows and steps, and lets every score pass: a package that
lacks and a command that is wrong show there (``TOOLKIT_GPU_PROFILE=local-cpu``).
"""

from __future__ import annotations

import json
import os
import shutil
from itertools import chain
from pathlib import Path
from statistics import fmean

import pytest

from tests.gpu.host import DRY, PROFILE, SOURCE, logs, marks, run

# the marks of all tests here, without the need of a GPU in a dry run
pytestmark = marks[:1] if DRY else marks
DEMO = Path(__file__).parents[2] / "recipes" / "demo"
RECIPES = ("tickets", "tickets-qlora")
SEEDS = (1, 2)
"""Of the order of rows and the adapter's start: one score of 120 rows differs from the next by some 0.03."""
PARTS = {"base": ("tickets", "plain", "base", 1)} | {
    f"{recipe}-{speed}-{seed}": (recipe, speed, "tuned", seed)
    for recipe in RECIPES for speed in ("plain", "auto") for seed in SEEDS
}  # fmt: skip
NO_MORE = ("export.formats=[adapter]", "quantize=[]", "evaluate.gates=[]", "serve=null")
FEW = (
    "data.sources.0.arguments.rows=24", "data.heldout.sources.0.arguments.rows=3",
    "model.max_length=128", "train.max_steps=2", "evaluate.max_new_tokens=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    given = os.environ.get("TOOLKIT_GPU_QUALITY")
    folder = Path(given) if given else tmp_path_factory.mktemp("quality")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_trained_and_scored(folder, part):
    answer = left_by(part, folder)
    if not answer.exists():
        written = answer.with_suffix(".part")
        written.write_text(json.dumps(scored(folder, part), indent=1) + "\n")
        written.rename(answer)
    print(part, answer.read_text())


@pytest.mark.parametrize("recipe", RECIPES)
def test_both_paths_reach_the_same_heldout_score(folder, recipe):
    ways = [[f"{recipe}-{speed}-{seed}" for seed in SEEDS] for speed in ("plain", "auto")]
    wanted = ["base", *chain(*ways)]
    missing = [part for part in wanted if not left_by(part, folder).exists()]
    assert not missing, f"{folder} lacks these parts: {missing}"
    found = {part: json.loads(left_by(part, folder).read_text()) for part in wanted}
    print({part: answer["scores"] for part, answer in found.items()})
    base = found["base"]
    plain, auto = ([found[part] for part in way] for way in ways)
    assert not any(part["fast"] for part in plain)
    for metric in ("exact_match", "json_match"):
        scores = [fmean(part["scores"][metric] for part in one) for one in (plain, auto)]
        assert scores[1] == pytest.approx(scores[0], abs=0.05)
    if not DRY:
        assert all(part["fast"] for part in auto)
        assert base["scores"]["exact_match"] < 0.05
        assert all(part["scores"]["exact_match"] >= 0.8 for part in (*plain, *auto))


def left_by(part: str, folder: Path) -> Path:
    """Where a part's answer lies; that of a dry run is no answer."""
    return folder / f"{part}{'-dry' * DRY}.json"


def scored(folder: Path, part: str) -> dict:
    """One recipe as far as the evaluation of one model, on one GPU."""
    recipe, speed, subject, seed = PARTS[part]
    project = folder / part
    shutil.copytree(DEMO, project, dirs_exist_ok=True)
    source = (f"model.source={SOURCE}", "model.sha256=null") if SOURCE else ()
    own = (f"train.speed={speed}", f"evaluate.of=[{subject}]", f"seed={seed}")
    few = FEW if DRY else ()
    changes = [word for one in (*NO_MORE, *source, *own, *few) for word in ("--set", one)]

    def ask(verb: str) -> dict:
        done = run(
            verb, project / f"{recipe}.yaml", "--json", *changes,
            "--profile", PROFILE, "--workspace", project / "runs",
            timeout_s=3600 if DRY else 900, one_gpu=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stderr[-4000:]}\n{logs(project)}"
        return json.loads(done.stdout)

    fast = ask("plan")["training"]["speed"]["fast"]
    steps = {step["name"]: step for step in ask("evaluate")["steps"]}
    return {
        "part": part, "fast": fast, "scores": steps[f"evaluate-{subject}"]["metrics"],
        "train": steps["train"]["metrics"] if "train" in steps else {},
        "seconds": {name: step["seconds"] for name, step in steps.items()},
    }  # fmt: skip
