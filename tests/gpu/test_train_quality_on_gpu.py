"""The demo task reaches the same held-out score by the fast path as by the plain one; LoRA and QLoRA.

Four runs beside each other on one GPU, each in a workspace of its own. ``host.py`` says which variables name the model
and the profile; ``TOOLKIT_GPU_QUALITY`` keeps the four answers as a JSON file.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gpu.host import PROFILE, SOURCE, logs, marks, run

pytestmark = marks
DEMO = Path(__file__).parents[2] / "recipes" / "demo"
NO_MORE = ("export.formats=[adapter]", "quantize=[]", "evaluate.gates=[]", "serve=null")


def scored(folder: Path, recipe: str, speed: str) -> dict:
    """One recipe as far as the evaluation of what it trained."""
    project = folder / f"{recipe}-{speed}"
    shutil.copytree(DEMO, project)
    source = (f"model.source={SOURCE}", "model.sha256=null") if SOURCE else ()
    changes = [
        part for one in (*NO_MORE, *source, f"train.speed={speed}") for part in ("--set", one)
    ]
    done = run(
        "evaluate", project / f"{recipe}.yaml", "--json", *changes,
        "--profile", PROFILE, "--workspace", project / "runs", timeout_s=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{logs(project)}"
    steps = {step["name"]: step for step in json.loads(done.stdout)["steps"]}
    return {
        "base": steps["evaluate-base"]["metrics"], "tuned": steps["evaluate-tuned"]["metrics"],
        "train": steps["train"]["metrics"], "seconds": steps["train"]["seconds"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("quality")
    cases = [(r, s) for r in ("tickets", "tickets-qlora") for s in ("plain", "auto")]
    with ThreadPoolExecutor(len(cases)) as pool:
        made = dict(zip(cases, pool.map(lambda case: scored(folder, *case), cases), strict=True))
    lines = {f"{recipe} {speed}": value for (recipe, speed), value in made.items()}
    print(json.dumps(lines, indent=1))
    if kept := os.environ.get("TOOLKIT_GPU_QUALITY"):
        Path(kept).write_text(json.dumps(lines, indent=1) + "\n")
    return made


@pytest.mark.parametrize("recipe", ["tickets", "tickets-qlora"])
def test_both_paths_reach_the_same_heldout_score(found, recipe):
    plain, auto = (found[recipe, speed]["tuned"] for speed in ("plain", "auto"))
    assert plain["exact_match"] >= 0.8
    assert found[recipe, "plain"]["base"]["exact_match"] < 0.05
    # 120 rows: one standard deviation of a score of 0.95 is 0.02
    assert auto["exact_match"] == pytest.approx(plain["exact_match"], abs=0.05)
    assert auto["json_match"] == pytest.approx(plain["json_match"], abs=0.05)
