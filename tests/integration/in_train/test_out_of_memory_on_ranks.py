"""One of two ranks runs out of memory in the middle of a pass: both start again, and it is the same run."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.train import Train, TrainConfig

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[3]
PROGRAM = Path(__file__).parent / "oom_program.py"
LAUNCHER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from toolkit.train.parallel.launch import Launch, run
for state in map(Path, sys.argv[3:]):
    print(run(Launch(2), "test", Path(sys.argv[2]), state / "step.json", state), flush=True)
"""
CASES = {
    "ddp": ({"batch_size": 4, "parallel": "ddp"}, {"ranks": [1], "most": 2, "after": 3}),
    "fsdp": ({"batch_size": 4, "parallel": "fsdp"}, {"ranks": [0, 1], "most": 2, "after": 3}),
    "never": ({"batch_size": 2, "parallel": "ddp"}, {"ranks": [0], "most": 0, "after": 0}),
}
"""What is trained, and which ranks hold how few sequences at once, from which pass on."""


@dataclass
class Case:
    """A run of two ranks that was made to fail."""

    folder: Path
    code: str = ""
    said: str = ""

    def log(self, key: str) -> list[tuple[int, float]]:
        lines = (self.folder / "output" / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [(one["step"], one["metrics"][key]) for one in found if key in one["metrics"]]

    @property
    def notes(self) -> str:
        events = map(json.loads, (self.folder / "events.jsonl").read_text().splitlines())
        return "\n".join(event["text"] for event in events if event["event"] == "note")

    @property
    def result(self) -> dict:
        return json.loads((self.folder / "state" / "result.json").read_text())


def config(**changes) -> TrainConfig:
    values = {"lora": {"rank": 8, "alpha": 16}, "max_steps": 7, "batch_size": 4, "packing": False}
    values |= {"learning_rate": 1e-2, "checkpoint_every": 2}
    return TrainConfig.model_validate({"train": values | changes, "max_length": 48, "seed": 3})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, dataset):
    root = tmp_path_factory.mktemp("oom")
    inputs = {
        "model": Input(base, Kind.model, "b" * 64, {"source": "tests/small-llama"}),
        "dataset": Input(dataset, Kind.dataset, "d" * 64, {}),
    }
    cases = {}
    for name, (changes, holds) in CASES.items():
        folder = root / name
        for part in ("output", "state"):
            (folder / part).mkdir(parents=True)
        made = config(on_oom="halve_batch", **changes)
        step = {
            "stage": "train", "config": made.model_dump(mode="json"),
            "inputs": {
                role: {"path": str(i.path), "kind": i.kind, "fingerprint": i.fingerprint, "facts": dict(i.facts)}
                for role, i in inputs.items()
            },
            "output": str(folder / "output"), "state": str(folder / "state"),
            "recipe_dir": str(root), "device": "cpu", "resume": False, "interpreters": {},
            "holds": holds,
        }  # fmt: skip
        (folder / "state" / "step.json").write_text(json.dumps(step))
        cases[name] = Case(folder)
    states = [str(case.folder / "state") for case in cases.values()]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ran = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(ROOT), str(PROGRAM), *states],
        env=os.environ | own, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    codes = ran.stdout.split()
    assert len(codes) == len(cases), ran.stderr[-6000:]
    for case, code in zip(cases.values(), codes, strict=True):
        case.code, case.said = code, ran.stderr
    whole = root / "whole"
    for part in ("output", "state"):
        (whole / part).mkdir(parents=True)
    ctx = StageContext(inputs, whole / "output", whole / "state", root)
    Train().run(config(gradient_accumulation=2, checkpoint_every=None), ctx)
    cases["whole"] = Case(whole)
    return cases


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_both_ranks_start_again_and_it_is_the_same_run(runs, engine):
    case, whole = runs[engine], runs["whole"]
    assert case.code == "0", case.said[-6000:]
    for key, near in (("loss", 2e-4), ("grad_norm", 2e-3)):
        steps, values = zip(*case.log(key), strict=True)
        assert list(steps) == [1, 2, 3, 4, 5, 6, 7]
        assert list(values) == pytest.approx([v for _, v in whole.log(key)], rel=near), key
    facts = case.result["facts"]
    assert (facts["effective_batch"], facts["ranks"], facts["parallel"]) == (8, 2, engine)
    assert (case.folder / "output" / "adapter_model.safetensors").is_file()


def test_ddp_goes_on_from_the_last_step_and_fsdp_from_the_last_checkpoint(runs):
    for name, went_on_after in (("ddp", 3), ("fsdp", 2)):
        assert runs[name].log("sequences_at_once") == [(4, 2.0)]
        assert f"going on after step {went_on_after} of 7" in runs[name].notes
    kept = sorted(p.name for p in (runs["ddp"].folder / "state" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]


def test_the_log_says_who_failed_and_what_is_done(runs):
    says = (
        "rank 1 of 2 ran out of GPU memory at step 4 with 4 sequences at a time: all ranks start "
        "again with 2, the same rows and the same loss"
    )
    assert says in runs["ddp"].said
    assert says in runs["ddp"].notes


def test_what_cannot_be_halved_any_more_stops_all_with_one_error(runs):
    case = runs["never"]
    assert case.code == "1"
    asked = json.loads((case.folder / "state" / "again-0.json").read_text())
    assert (asked["step"], asked["sequences"], asked["at_once"]) == (1, 2, 1)
    error = json.loads((case.folder / "state" / "error.json").read_text())
    assert error["type"] == "StepFailedError"
    assert error["message"].startswith(
        "rank 0 of 2: out of GPU memory at step 1, with 1 sequence at a time: CUDA out of memory"
    )
    assert "halve_batch" not in error["hint"]
