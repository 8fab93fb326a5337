"""Steps over a small Llama: seconds on one core."""

import dataclasses
import json
from pathlib import Path

import pytest
from small_llama import counting_rows, small_llama

from toolkit.data.store import TokenStore
from toolkit.recipe.train import TrainSection
from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.train import TrainConfig

MAX_LENGTH = 48


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return small_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    TokenStore.write(folder / "tokens" / "train", counting_rows(64, seed=1))
    TokenStore.write(folder / "tokens" / "heldout", counting_rows(12, seed=2))
    return folder


@pytest.fixture
def train_config():
    def build(**changes) -> TrainConfig:
        values = {
            "method": "lora",
            "lora": {"rank": 8, "alpha": 16},
            "max_steps": 8,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "checkpoint_every": None,
        }
        return TrainConfig(train=TrainSection(**(values | changes)), max_length=MAX_LENGTH, seed=3)

    return build


@pytest.fixture
def context(tmp_path, base, dataset):
    """Contexts of steps that read the small base and dataset, each with an empty output folder."""

    def build(name: str = "run", adapter: Input | None = None, **changes) -> StageContext:
        inputs = {
            "model": Input(base, Kind.model, "b" * 64, {"source": "tests/small-llama"}),
            "dataset": Input(dataset, Kind.dataset, "d" * 64, {}),
        }
        if adapter is not None:
            inputs["adapter"] = adapter
        output, state = tmp_path / name / "output", tmp_path / name / "state"
        output.mkdir(parents=True)
        state.mkdir(exist_ok=True)
        made = StageContext(inputs, output, state, tmp_path)
        return dataclasses.replace(made, **changes)

    return build


@pytest.fixture
def logged():
    def read(folder: Path, key: str) -> list[float]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["metrics"][key] for line in lines if key in line["metrics"]]

    return read
