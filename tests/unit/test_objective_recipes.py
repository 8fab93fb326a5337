"""What stands beside the recipes of other objectives: rewards and pairs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def module(monkeypatch):
    def load(path):
        monkeypatch.syspath_prepend(str(path.parent))
        spec = importlib.util.spec_from_file_location(f"shipped_{path.stem}", path)
        found = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, found)
        spec.loader.exec_module(found)
        return found

    return load


def test_a_right_number_is_rewarded_wherever_its_format_is_loose(module):
    rewards = module(RECIPES / "math_rewards.py")
    answers = ["2 + 2 = 4\n#### 4", "#### 1,004", "It is 4.", "", "#### 4 is it\nnot", "#### $4"]
    references = ["so <<2+2=4>>\n#### 4", "#### 1004", "#### 4", "#### 4", "#### 4", "#### 4"]
    assert rewards.right_number(answers, references) == [1, 1, 0, 0, 1, 1]
    assert rewards.ends_with_number(answers) == [1, 1, 0, 0, 0, 1]
    assert rewards.right_number(["#### 4"], [None]) == [0]


def test_pairs_of_the_demo_differ_in_one_place(module):
    pairs = module(RECIPES / "demo" / "pairs.py")
    rows = list(pairs.train_pairs(200, seed=3))
    changed = set()
    for row in rows:
        right, wrong = json.loads(row["chosen"]), json.loads(row["rejected"])
        (key,) = [key for key in right if right[key] != wrong[key]]
        changed.add(key)
        assert right.keys() == wrong.keys()
    assert changed == {"team", "urgent", "order"}
    assert rows == list(pairs.train_pairs(200, seed=3))
    assert not {r["prompt"][0]["content"] for r in rows} & {
        r["prompt"][0]["content"] for r in pairs.heldout_pairs(60, seed=2)
    }
