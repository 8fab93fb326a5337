"""Preflight refuses exactly those adapters that the locked vLLM refuses itself: its own check is asked."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.folders import adapter_folder, model_folder
from toolkit.preflight import Outcome, check, gather
from toolkit.recipe import Recipe

pytestmark = pytest.mark.integration

ASK_VLLM = """
import json, sys
from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.lora.peft_helper import PEFTHelper
from typing import get_args
largest = max(get_args(MaxLoRARanks))
answers = {}
for name, config in json.load(sys.stdin).items():
    try:
        PEFTHelper.from_dict(config).validate_legal(LoRAConfig(max_lora_rank=largest))
        answers[name] = None
    except ValueError as error:
        answers[name] = str(error)
print("ANSWERS" + json.dumps(answers))
"""

PLAIN = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
    "bias": "none",
}
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "untouched": {"init_lora_weights": False},
    "score": {"modules_to_save": ["score"]},
    "pattern": {"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"q_proj": 4}},
    "rank 512": {"r": 512},
    "rank 513": {"r": 513},
    "rank by pattern": {"rank_pattern": {"q_proj": 600}},
    "no rank": {"r": 0},
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["embed_tokens"]},
    "bias": {"bias": "lora_only"},
    "lora bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq"},
    "alora": {"alora_invocation_tokens": [1, 2]},
    "replication": {"layer_replication": [[0, 1], [0, 2]]},
    "bdlora": {"use_bdlora": {"nblocks": 2}},
    "qalora": {"use_qalora": True},
}


def preflight_refuses(folder: Path, config: dict) -> bool:
    model_folder(folder / "model")
    adapter_folder(folder / "a", **config)
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "model": {"source": "./model"},
            "serve": {"adapters": [{"name": "a", "path": "./a"}]},
        }
    )
    verdicts = check(recipe, gather(recipe, folder, accelerator="cpu"))
    return any(v.outcome is Outcome.refuse and v.rule.startswith("adapter.") for v in verdicts)


@pytest.mark.timeout(900)
def test_preflight_and_vllm_refuse_the_same_adapters(tmp_path):
    from toolkit.environments import resolve

    interpreter = resolve("vllm", accelerator="cpu").interpreter()
    configs = {name: PLAIN | changes for name, changes in VARIANTS.items()}
    done = subprocess.run(
        [interpreter.python, "-c", ASK_VLLM],
        input=json.dumps(configs),
        env=interpreter.environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.rpartition("ANSWERS")[2])
    ours = {name: preflight_refuses(tmp_path / name, config) for name, config in configs.items()}
    assert ours == {name: answer is not None for name, answer in theirs.items()}, theirs
    assert sum(ours.values()) == 15
