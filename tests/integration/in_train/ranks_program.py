"""What every rank of ``test_ranks.py`` runs: the cases of a file, one after the other, after one slow start.

Each rank leaves ``outcome-RANK.json`` in the folder of a case: what the stage gave or raised, and what its engine was.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.train import Train, TrainConfig
from toolkit.train.parallel import zero
from toolkit.train.parallel.engine import Engine

RANK = int(os.environ["RANK"])
ENGINES = []


@dataclass(frozen=True)
class StoppedOnOneRank(StageContext):
    """SIGTERM reaches the second rank alone, when step 5 is logged."""

    def log(self, step, **metrics):
        super().log(step, **metrics)
        if step == 5 and "loss" in metrics and not self.speaks:
            os.kill(os.getpid(), signal.SIGTERM)


def remembered(engine, *arguments, **named):
    made(engine, *arguments, **named)
    ENGINES.append(engine)


def with_nothing_kept(*arguments):
    """DeepSpeed keeps weights below 100 000 numbers whole: all of this model."""
    made = settings(*arguments)
    made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return made


made, Engine.__init__ = Engine.__init__, remembered
settings, zero.settings = zero.settings, with_nothing_kept


def held(weight) -> int:
    """Numbers of a weight that this rank holds between two steps."""
    part = getattr(weight, "ds_tensor", weight)
    return (part.to_local() if hasattr(part, "to_local") else part).numel()


def what_it_is(engine) -> dict:
    layer = engine.model.get_decoder().layers[0]
    return {
        "wrapped": type(engine.wrapped).__name__,
        "layer": [base.__name__ for base in type(layer).__mro__],
        "optimizer": type(engine.optimizer).__name__,
        "mine": sum(map(held, engine.model.parameters())),
    }


def outcome(case: dict) -> dict:
    folder = Path(case["folder"])
    inputs = {
        "model": Input(Path(case["base"]), Kind.model, "b" * 64, {"source": "tests/small-llama"}),
        "dataset": Input(Path(case["dataset"]), Kind.dataset, "d" * 64, {}),
    }
    kind = StoppedOnOneRank if case.get("stop") else StageContext
    ctx = kind(inputs, folder / "output", folder / "state", folder)
    if window := case.get("record"):
        ctx = replace(ctx, profile_steps=tuple(window))
    try:
        result = Train().run(TrainConfig.model_validate(case["config"]), ctx)
    except ToolkitError as error:
        return {"error": str(error)} | what_it_is(ENGINES.pop())
    return {"metrics": dict(result.metrics), "facts": dict(result.facts)} | what_it_is(
        ENGINES.pop()
    )


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        found = outcome(one)
        (Path(one["folder"]) / f"outcome-{RANK}.json").write_text(json.dumps(found))
