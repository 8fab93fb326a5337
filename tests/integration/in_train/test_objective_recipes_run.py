"""Every shipped recipe of another objective than SFT runs, small, on a CPU: rows, checks, training."""

import json
import shutil
from pathlib import Path

import pytest
from test_objectives import talker  # noqa: F401 - a fixture

from toolkit.observe import local_files
from toolkit.plan import Observed, make_plan
from toolkit.recipe.load import load
from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.data import Data, DataConfig
from toolkit.stages.train import Train, TrainConfig

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("default")]
RECIPES = Path(__file__).parents[3] / "recipes"
SMALL = (
    "train.max_steps=2", "train.batch_size=4", "train.gradient_accumulation=1", "train.learning_rate=1e-2",
    "train.evaluate_every=null", "train.checkpoint_every=null", "train.evaluate_rows=4",
)  # fmt: skip
HUB = {
    "llama-3.1-8b-dpo": {"prompt": "Hello?", "chosen": "Hello there!", "rejected": "The printer."},
    "llama-3.1-8b-grpo": {"question": "What is 2 + 2?", "answer": "It is 4.\n#### 4"},
}
"""A row as the data set on the Hub has it, for recipes that read one."""
LENGTH = "def length(completions):\n    return [len(text) / 20 for text in completions]\n"
"""A reward beside the recipe's own, which a model without training never earns: with all at 0 nothing is learned."""
GRPO = (
    "train.grpo.max_completion_tokens=8",
    "train.grpo.group_size=4",
    "train.grpo.weights=[1, 1, 1]",
)
CASES = {
    "demo/tickets-dpo": (),
    "demo/tickets-orpo": (),
    "demo/tickets-kto": (),
    "demo/tickets-grpo": (
        *GRPO,
        "train.grpo.rewards=[ticket_rewards.py:right_fields, ticket_rewards.py:is_json, length.py:length]",
    ),
    "llama-3.1-8b-dpo": (),
    "llama-3.1-8b-grpo": (
        *GRPO,
        "train.grpo.rewards=[math_rewards.py:right_number, math_rewards.py:ends_with_number, length.py:length]",
    ),
}


@pytest.fixture
def recipe(tmp_path):
    """A copy of a recipe with what stands beside it; sources on the Hub become a small file."""

    def copied(name: str, *overrides: str):
        folder = tmp_path / "recipes"
        shutil.copytree((RECIPES / name).parent, folder)
        path = folder / f"{Path(name).name}.yaml"
        (folder / "length.py").write_text(LENGTH)
        if row := HUB.get(name):
            rows = [
                row | {key: f"{n}: {text}" for key, text in row.items() if key != "answer"}
                for n in range(12)
            ]
            (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
            (folder / "more.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows[:4]))
            lines = _local(path.read_text())
            path.write_text(lines)
        return load(path, (*SMALL, *overrides))

    return copied


def _local(text: str) -> str:
    """Sources of a recipe without the keys that say where on the Hub they are."""
    kept, files = [], iter(("rows.jsonl", "more.jsonl"))
    for line in text.splitlines():
        key = line.strip().removeprefix("- ").partition(":")[0]
        if key == "hub":
            kept.append(line.partition("hub:")[0] + f"path: {next(files)}")
        elif key in ("subset", "split", "weight") or (
            key == "revision" and line.startswith("      ")
        ):
            continue
        else:
            kept.append(line)
    return "\n".join(kept) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_it_runs_small_on_a_cpu(name, recipe, talker, tmp_path):  # noqa: F811 - a fixture
    short = ["data.sources.0.arguments={rows: 24, seed: 3}"] if name.startswith("demo") else []
    loaded = recipe(name, *CASES[name], *short)
    files = {text: "0" * 64 for text, _ in local_files(loaded.recipe)}
    plan = make_plan(loaded, Observed(files, {}))
    model = Input(talker, Kind.model, "b" * 64, {"source": "tests/talker"})

    def context(step: str, inputs: dict[str, Input]) -> StageContext:
        for part in ("output", "state"):
            (tmp_path / step / part).mkdir(parents=True)
        return StageContext(
            inputs, tmp_path / step / "output", tmp_path / step / "state", loaded.directory
        )

    made = context("data", {"model": model})
    Data().run(DataConfig.model_validate(plan.step("data").config), made)
    rows = Input(made.output, Kind.dataset, "d" * 64, {})
    trained = context("train", {"model": model, "dataset": rows})
    result = Train().run(TrainConfig.model_validate(plan.step("train").config), trained)
    assert result.facts["objective"] == loaded.recipe.train.objective
    assert result.metrics["steps"] == 2
    assert (trained.output / "adapter_model.safetensors").is_file()
