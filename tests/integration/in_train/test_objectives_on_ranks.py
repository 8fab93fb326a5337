"""DPO, KTO, ORPO and GRPO on two processes: as on one that takes twice as many passes."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from objectives_program import run
from test_objectives import MAX_LENGTH, row, talker  # noqa: F401 - a fixture
from test_ranks import torchrun

from toolkit.errors import ArtifactError, PreflightError
from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.data import Data, DataConfig
from toolkit.stages.train import TrainConfig
from toolkit.train.parallel.ranks import Ranks
from toolkit.train.trainer import Run

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("default")]

LONG = "def long(completions):\n    return [len(text) / 20 for text in completions]\n"
GRPO = {"rewards": ["r.py:long"], "group_size": 4, "max_completion_tokens": 16, "beta": 0.1}
CASES = {
    "dpo": {"evaluate_every": 4},
    "orpo": {"max_steps": 4},
    "kto": {"kto": {"loss": "apo_zero_unpaired"}, "max_steps": 4},
    "grpo": {"grpo": GRPO, "learning_rate": 1e-3, "max_steps": 4},
    "kto-with-kl": {"max_steps": 2},
    "qlora": {"objective": "dpo", "method": "qlora", "max_steps": 2},
}
"""Recipes by name, which is the objective where it does not say so."""


@dataclass
class Runs:
    """Runs by name: of one process where ``passes`` is 2, else of two."""

    root: Path
    model: Path
    data: dict[str, Path]
    passes: int
    cases: list[dict] = field(default_factory=list)

    def add(self, name: str, state: Path | None = None, **changes) -> dict:
        folder = self.root / name
        (folder / "output").mkdir(parents=True)
        if state is None:
            (folder / "state").mkdir()
        else:
            (folder / "state").symlink_to(state)
        (folder / "r.py").write_text(LONG)
        objective = changes.pop("objective", name.partition("-")[0])
        stop = changes.pop("stop", False)
        section = {
            "objective": objective, "lora": {"rank": 8, "alpha": 16}, "max_steps": 8, "batch_size": 4,
            "learning_rate": 1e-2, "checkpoint_every": None, "gradient_accumulation": self.passes,
        }  # fmt: skip
        config = {"train": section | changes, "max_length": MAX_LENGTH, "seed": 3}
        case = {
            "folder": str(folder), "base": str(self.model), "dataset": str(self.data[objective]),
            "config": TrainConfig.model_validate(config).model_dump(mode="json"),
            "stop": stop, "same_answers": objective == "grpo",
        }  # fmt: skip
        self.cases.append(case)
        return case

    def outcome(self, name: str, rank: int = 0) -> dict:
        return json.loads((self.root / name / f"outcome-{rank}.json").read_text())

    def log(self, name: str, key: str) -> list[float]:
        lines = (self.root / name / "output" / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line)["metrics"] for line in lines]
        return [one[key] for one in metrics if key in one]


@pytest.fixture(scope="module")
def data(tmp_path_factory, talker):  # noqa: F811 - a fixture
    """Rows of every objective, as the data step makes them: 24 to train on, 3 steps of 8 in an epoch."""
    root, found = tmp_path_factory.mktemp("rows"), {}
    model = Input(talker, Kind.model, "b" * 64, {"source": "tests/talker"})
    for objective in ("dpo", "orpo", "kto", "grpo"):
        for file, numbers in (("a.jsonl", range(24)), ("b.jsonl", range(24, 32))):
            rows = [json.dumps(row(objective, n)) + "\n" for n in numbers]
            (root / file).write_text("".join(rows))
        folder = root / objective
        for part in ("output", "state"):
            (folder / part).mkdir(parents=True)
        values = {"sources": [{"path": "a.jsonl"}], "heldout": {"sources": [{"path": "b.jsonl"}]}}
        config = DataConfig.model_validate(
            {
                "data": values, "max_length": MAX_LENGTH, "seed": 0, "objective": objective,
                "answer_tokens": 16 if objective == "grpo" else 0,
            }
        )  # fmt: skip
        Data().run(
            config, StageContext({"model": model}, folder / "output", folder / "state", root)
        )
        found[objective] = folder / "output"
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory, talker, data):  # noqa: F811 - a fixture
    runs = Runs(tmp_path_factory.mktemp("alone"), talker, data, 2)
    for name, changes in CASES.items():
        case = runs.add(name, **changes)
        found = run(case, StageContext)
        assert "error" not in found, found
        (Path(case["folder"]) / "outcome-0.json").write_text(json.dumps(found))
    return runs


@pytest.fixture(scope="module")
def together(tmp_path_factory, talker, data):  # noqa: F811 - a fixture
    runs = Runs(tmp_path_factory.mktemp("together"), talker, data, 1)
    for name, changes in CASES.items():
        runs.add(name, **changes)
    runs.add("dpo-stopped", stop=True)
    runs.add("dpo-resumed", state=runs.root / "dpo-stopped" / "state")
    (runs.root / "cases.json").write_text(json.dumps(runs.cases))
    ran = torchrun(Path(__file__).parent / "objectives_program.py", runs.root / "cases.json")
    assert ran.returncode == 0, ran.stderr[-8000:]
    return runs


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto", "grpo", "qlora"])
def test_two_processes_train_as_one_does(alone, together, name):
    assert "error" not in together.outcome(name), together.outcome(name)
    for key in ("loss", "grad_norm"):
        assert together.log(name, key) == pytest.approx(alone.log(name, key), rel=1e-3, abs=1e-5), (
            key
        )
    told = "reward" if name == "grpo" else "rewards_margins"
    near = 0.02 if name == "kto" else 1e-3  # TRL averages good and bad over both, not over passes
    assert together.log(name, told) == pytest.approx(alone.log(name, told), rel=near, abs=1e-4)
    for key in ("rows_seen", "tokens", "trained_tokens"):
        assert together.outcome(name)["metrics"][key] == alone.outcome(name)["metrics"][key], key
    two, one = together.outcome(name)["facts"], alone.outcome(name)["facts"]
    assert (two["parallel"], two["ranks"]) == ("ddp", 2)
    for key in ("effective_batch", "row_order", "rank", "targets"):
        assert two[key] == one[key], key


def test_held_out_pairs_are_scored_over_both(alone, together):
    for key in ("heldout_loss", "heldout_rewards_margins"):
        assert together.log("dpo", key) == pytest.approx(alone.log("dpo", key), rel=1e-3), key


def test_the_adapter_is_the_same_on_disk(alone, together):
    from safetensors.torch import load_file

    for name in ("dpo", "grpo"):
        one, two = (
            load_file(runs.root / name / "output" / "adapter_model.safetensors")
            for runs in (alone, together)
        )
        assert one.keys() == two.keys()
        for key in one:
            assert (one[key] - two[key]).abs().max() < 2e-3, key


def test_the_kl_of_kto_is_taken_over_both(together):
    """From the other rows of each process's batch: not the number of one process with other batches."""
    assert together.log("kto-with-kl", "loss")[0] == pytest.approx(0.5, abs=0.02)
    assert "error" not in together.outcome("kto-with-kl")


def test_sigterm_on_one_process_stops_both_and_they_go_on(alone, together):
    for rank in (0, 1):
        assert "SIGTERM" in together.outcome("dpo-stopped", rank)["error"]
    kept = together.root / "dpo-stopped" / "state" / "trl"
    assert [p.name for p in kept.iterdir()] == ["checkpoint-6"]
    assert together.log("dpo-resumed", "loss") == pytest.approx(
        alone.log("dpo", "loss"), rel=1e-3, abs=1e-5
    )
    assert "error" not in together.outcome("dpo-resumed"), together.outcome("dpo-resumed")
    assert together.outcome("dpo-resumed")["metrics"]["rows_seen"] == 64


def test_one_process_goes_on_where_two_were_stopped(alone, together):
    kept = together.root / "dpo-stopped" / "state"
    folder = alone.root / "dpo-taken" / "state-of-two"
    shutil.copytree(kept, folder)
    case = alone.add("dpo-taken-over", state=folder, gradient_accumulation=1)
    found = run(case, StageContext)
    assert found["facts"]["effective_batch"] == 8
    assert alone.log("dpo-taken-over", "loss") == pytest.approx(
        alone.log("dpo", "loss"), rel=1e-3, abs=1e-5
    )


def started(together, ranks: Ranks, folder: Path, **changes):
    section = TrainConfig.model_validate(
        {"train": {"objective": "dpo"} | changes, "max_length": MAX_LENGTH, "seed": 3}
    ).train
    ctx = StageContext({}, folder, folder, folder)
    return Run.start(section, MAX_LENGTH, 3, None, ranks=ranks, ctx=ctx)  # type: ignore[arg-type]


def test_what_shares_weights_out_is_refused(together, tmp_path):
    with pytest.raises(PreflightError, match=r"'dpo' and train\.parallel 'fsdp'") as raised:
        started(together, Ranks(0, 2), tmp_path, parallel="fsdp")
    assert raised.value.hint.startswith("set train.parallel: ddp")


def test_a_step_that_cannot_be_shared_out_is_refused(together, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "wait", lambda _: None)
    shutil.copytree(together.root / "dpo-stopped" / "state" / "trl", tmp_path / "trl")
    with pytest.raises(ArtifactError, match="began with 2 passes of 8 sequences") as raised:
        started(together, Ranks(0, 4), tmp_path)
    assert raised.value.hint.startswith("go on with 1 or 2 processes")
