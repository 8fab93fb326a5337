"""What every rank of ``test_objectives_on_ranks.py`` runs: the cases of a file, after one slow start."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.stages import Input, Kind
from toolkit.stages.train import Train, TrainConfig


def always_the_same_answers() -> None:
    """GRPO's answers depend on the question and on which of its answers it is, on nothing random."""
    from trl import GRPOTrainer

    def answers(_trainer, prompt_ids, *_args, **_named):
        asked: Counter[int] = Counter()
        found = []
        for ids in prompt_ids:
            seed = sum(ids)
            nth = asked[seed]
            asked[seed] += 1
            found.append([(seed + 7 * nth + 3 * place) % 200 + 20 for place in range(4 + nth)])
        return found, None

    GRPOTrainer._generate_single_turn = answers


def run(case: dict, kind) -> dict:
    """Train one case; what the stage gave, or raised."""
    folder = Path(case["folder"])
    if case.get("same_answers"):
        always_the_same_answers()
    inputs = {
        "model": Input(Path(case["base"]), Kind.model, "b" * 64, {"source": "tests/talker"}),
        "dataset": Input(Path(case["dataset"]), Kind.dataset, "d" * 64, {}),
    }
    ctx = kind(inputs, folder / "output", folder / "state", folder)
    try:
        result = Train().run(TrainConfig.model_validate(case["config"]), ctx)
    except ToolkitError as error:
        return {"error": str(error)}
    return {"metrics": dict(result.metrics), "facts": dict(result.facts)}


if __name__ == "__main__":
    from ranks_program import StoppedOnOneRank

    from toolkit.stages import StageContext

    for one in json.loads(Path(sys.argv[1]).read_text()):
        found = run(one, StoppedOnOneRank if one.get("stop") else StageContext)
        file = Path(one["folder"]) / f"outcome-{os.environ['RANK']}.json"
        file.write_text(json.dumps(found))
