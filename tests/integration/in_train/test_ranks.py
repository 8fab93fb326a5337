"""Two processes train as one does: every engine, uneven steps, stopped and resumed on another number of ranks."""

import dataclasses
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.errors import StepFailedError
from toolkit.stages.train import Train
from toolkit.train import checkpoint

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[3]

METHODS = {
    "lora": {"method": "lora"},
    "full": {"method": "full", "learning_rate": 1e-3},
    "qlora": {"method": "qlora"},
}
TRAINED = [
    ("lora", "ddp"), ("lora", "fsdp"), ("lora", "zero2"), ("lora", "zero3"),
    ("full", "ddp"), ("full", "fsdp"), ("full", "zero2"), ("full", "zero3"),
    ("qlora", "ddp"), ("qlora", "fsdp"), ("qlora", "zero2"), ("qlora", "zero3"),
]  # fmt: skip
UNEVEN = {"packing": False, "batch_size": 5, "max_steps": None, "epochs": 1}  # 13 micro-batches
HANDED_ON = [("ddp", "zero3"), ("zero3", "fsdp"), ("fsdp", "zero2"), ("zero2", "ddp")]
"""Stopped with the first engine, resumed with the second: neither number of ranks nor engine is in a checkpoint."""


@dataclasses.dataclass
class Runs:
    """Folders of runs by name, and what they were asked for."""

    root: Path
    base: Path
    dataset: Path
    cases: list[dict] = dataclasses.field(default_factory=list)

    def add(self, name: str, config, state: str | None = None, **more) -> None:
        folder = self.root / name
        (folder / "output").mkdir(parents=True)
        (folder / "state").mkdir()
        if state:  # not there before the case that makes it has run
            (folder / "state").rmdir()
            (folder / "state").symlink_to(self.root / state / "state")
        self.cases.append(
            {
                "folder": str(folder),
                "base": str(self.base),
                "dataset": str(self.dataset),
                "config": config.model_dump(mode="json"),
                **more,
            }
        )

    def outcome(self, name: str, rank: int = 0) -> dict:
        return json.loads((self.root / name / f"outcome-{rank}.json").read_text())

    def log(self, name: str, key: str) -> list[float]:
        lines = (self.root / name / "output" / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line)["metrics"] for line in lines]
        return [one[key] for one in metrics if key in one]


@pytest.fixture(scope="module")
def configs():
    from toolkit.recipe.train import TrainSection
    from toolkit.stages.train import TrainConfig

    def build(**changes) -> TrainConfig:
        values = {
            "lora": {"rank": 8, "alpha": 16},
            "max_steps": 8,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "checkpoint_every": None,
            "evaluate_every": 4,
        }
        return TrainConfig(train=TrainSection(**(values | changes)), max_length=48, seed=3)

    return build


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base, dataset, configs):
    """Runs of one process that takes two passes where two ranks take one each."""
    from toolkit.stages import Input, Kind, StageContext

    runs = Runs(tmp_path_factory.mktemp("alone"), base, dataset)

    def run(name: str, ctx_kind=StageContext, **changes):
        folder = runs.root / name
        for part in ("output", "state"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        inputs = {
            "model": Input(base, Kind.model, "b" * 64, {"source": "tests/small-llama"}),
            "dataset": Input(dataset, Kind.dataset, "d" * 64, {}),
        }
        ctx = ctx_kind(inputs, folder / "output", folder / "state", folder)
        passes = 2 * changes.pop("gradient_accumulation", 1)
        return Train().run(configs(gradient_accumulation=passes, **changes), ctx)

    for name, changes in METHODS.items():
        run(name, **changes)
    run("uneven", **UNEVEN, gradient_accumulation=2)
    with pytest.raises(StepFailedError, match="after step 5 of 8"):
        run("stopped", ctx_kind=stopped_at_five())
    runs.run = run
    return runs


def stopped_at_five():
    from test_resume import Interrupted

    return Interrupted


@pytest.fixture(scope="module")
def together(tmp_path_factory, base, dataset, configs, alone):
    """All runs of two ranks, after one start of torchrun."""
    runs = Runs(tmp_path_factory.mktemp("together"), base, dataset)
    for method, engine in TRAINED:
        runs.add(f"{method}-{engine}", configs(parallel=engine, **METHODS[method]))
    for engine in ("ddp", "fsdp", "zero2", "zero3"):
        uneven = configs(parallel=engine, gradient_accumulation=2, **UNEVEN)
        runs.add(f"uneven-{engine}", uneven)
    for first, then in HANDED_ON:
        runs.add(f"stopped-{first}", configs(parallel=first), stop=True)
        runs.add(f"{first}-to-{then}", configs(parallel=then), state=f"stopped-{first}")
    # of one process before: its steps keep their two micro-batches, whatever the recipe's accumulation gives here
    state = runs.root / "from-one" / "state"
    runs.add("from-one", configs(parallel="fsdp", gradient_accumulation=2))
    shutil.copytree(alone.root / "stopped" / "state", state, dirs_exist_ok=True)
    runs.add("recorded", configs(parallel="fsdp", max_steps=3), record=[2, 3])
    runs.add("broken", configs(parallel="fsdp", learning_rate=1e30))
    cases = runs.root / "cases.json"
    cases.write_text(json.dumps(runs.cases))
    ran = torchrun(Path(__file__).parent / "ranks_program.py", cases)
    assert ran.returncode == 0, ran.stderr[-8000:]
    return runs


def torchrun(program: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        env=os.environ | own, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip


@pytest.mark.parametrize(("method", "engine"), TRAINED)
def test_two_ranks_train_as_one_process_does(alone, together, method, engine):
    name = f"{method}-{engine}"
    for key in ("loss", "grad_norm", "heldout_loss"):
        assert together.log(name, key) == pytest.approx(alone.log(method, key), rel=2e-4), key
    for key in ("learning_rate", "trained_tokens"):
        assert together.log(name, key) == alone.log(method, key)
    facts = together.outcome(name)["facts"]
    assert (facts["parallel"], facts["ranks"], facts["effective_batch"]) == (engine, 2, 4)


def test_the_rows_are_those_of_one_process_in_their_order(alone, together, configs):
    one = checkpoint.read_position(
        checkpoint.newest(alone.root / "stopped" / "state" / "checkpoints")
    )
    for engine in ("ddp", "zero3"):
        folder = together.root / f"stopped-{engine}" / "state" / "checkpoints"
        position = checkpoint.read_position(folder / "step-00000005")
        assert dataclasses.replace(position, seconds=0) == dataclasses.replace(one, seconds=0)


def test_the_first_rank_records_and_says_the_speed_of_all(together):
    folder = together.root / "recorded" / "output" / "profile"
    assert {path.name for path in folder.iterdir()} == {"steps-2-3.json.gz", "steps-2-3.txt"}
    trace = json.loads(gzip.decompress((folder / "steps-2-3.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step 2", "step 3"} <= names
    assert any("allgather" in str(name).lower() or "all_gather" in str(name) for name in names)
    speed, taken = (together.log("recorded", key) for key in ("tokens_per_second", "step_s"))
    assert sum(s * t for s, t in zip(speed, taken, strict=True)) == pytest.approx(
        together.outcome("recorded")["metrics"]["tokens"]
    )


@pytest.mark.parametrize(
    ("name", "wrapped", "layer", "optimizer"),
    [
        ("lora-ddp", "DistributedDataParallel", "LlamaDecoderLayer", "AdamW"),
        ("lora-fsdp", "FSDPInside", "FSDPModule", "AdamW"),
        ("full-fsdp", "FSDPInside", "FSDPModule", "AdamW"),
        ("lora-zero2", "DeepSpeedEngine", "LlamaDecoderLayer", "DeepSpeedZeroOptimizer"),
        ("lora-zero3", "DeepSpeedEngine", "LlamaDecoderLayer", "DeepSpeedZeroOptimizer_Stage3"),
    ],
)
def test_the_engine_is_what_it_says(together, name, wrapped, layer, optimizer):
    """A library's FSDP has become DDP in silence before."""
    found = together.outcome(name)
    assert (found["wrapped"], found["optimizer"]) == (wrapped, optimizer)
    assert layer in found["layer"]


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_sharded_weights_are_shared_out(together, method):
    whole = together.outcome(f"{method}-ddp")["mine"]
    for engine in ("fsdp", "zero3"):
        halves = [together.outcome(f"{method}-{engine}", rank)["mine"] for rank in (0, 1)]
        assert sum(halves) == pytest.approx(whole, rel=0.01), engine
        assert max(halves) < 0.6 * whole, engine


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3"])
def test_a_rank_with_nothing_left_hangs_nobody_and_counts_nothing(alone, together, engine):
    """13 micro-batches in steps of four: in the last step the second rank has none."""
    losses = together.log(f"uneven-{engine}", "loss")
    assert len(losses) == 4
    assert losses == pytest.approx(alone.log("uneven", "loss"), rel=2e-4)
    assert together.log(f"uneven-{engine}", "heldout_loss") == pytest.approx(
        alone.log("uneven", "heldout_loss"), rel=2e-4
    )
    assert together.outcome(f"uneven-{engine}")["metrics"]["rows_seen"] == 64


@pytest.mark.parametrize("engine", [first for first, _ in HANDED_ON])
def test_sigterm_on_one_rank_stops_all_after_the_same_step(together, engine):
    for rank in (0, 1):
        assert "after step 5 of 8" in together.outcome(f"stopped-{engine}", rank)["error"]


@pytest.mark.parametrize(("first", "then"), HANDED_ON)
def test_another_engine_goes_on_from_a_checkpoint(alone, together, first, then):
    assert together.log(f"{first}-to-{then}", "loss") == pytest.approx(
        alone.log("lora", "loss"), rel=2e-4
    )


def test_two_ranks_go_on_where_one_was_stopped(alone, together):
    assert together.log("from-one", "loss") == pytest.approx(alone.log("lora", "loss"), rel=2e-4)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_one_process_goes_on_where_two_ranks_were_stopped(alone, together, engine):
    kept = together.root / f"stopped-{engine}" / "state" / "checkpoints" / "step-00000005"
    folder = alone.root / f"from-{engine}" / "state" / "checkpoints" / kept.name
    shutil.copytree(kept, folder)
    alone.run(f"from-{engine}")
    assert alone.log(f"from-{engine}", "loss") == pytest.approx(alone.log("lora", "loss"), rel=2e-4)


def test_a_loss_that_is_not_finite_is_one_error_on_all_ranks(together):
    errors = {together.outcome("broken", rank)["error"] for rank in (0, 1)}
    assert len(errors) == 1
    assert "step" in errors.pop()


def test_the_adapter_of_two_ranks_is_whole(together, alone):
    from safetensors.torch import load_file

    name = "adapter_model.safetensors"
    one = load_file(alone.root / "lora" / "output" / name)
    for engine in ("ddp", "fsdp", "zero2", "zero3"):
        two = load_file(together.root / f"lora-{engine}" / "output" / name)
        assert two.keys() == one.keys()
        assert all(two[key].shape == one[key].shape for key in one)


def test_the_model_of_two_ranks_is_whole_and_loads(together, alone):
    from transformers import AutoModelForCausalLM

    one = AutoModelForCausalLM.from_pretrained(alone.root / "full" / "output")
    for engine in ("ddp", "fsdp", "zero3"):
        two = AutoModelForCausalLM.from_pretrained(together.root / f"full-{engine}" / "output")
        for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
            assert (a - b).abs().max() < 1e-3, (engine, name)
