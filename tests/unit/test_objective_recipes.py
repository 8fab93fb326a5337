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


def test_marked_tickets_are_right_and_wrong_in_turn(module):
    pairs = module(RECIPES / "demo" / "pairs.py")
    rows, whole = list(pairs.train_marked(20, seed=3)), list(pairs.train_pairs(20, seed=3))
    assert [row["label"] for row in rows] == [True, False] * 10
    for row, pair in zip(rows, whole, strict=True):
        assert row["completion"] == pair["chosen" if row["label"] else "rejected"]


def test_a_ticket_is_rewarded_by_its_right_fields(module):
    rewards = module(RECIPES / "demo" / "ticket_rewards.py")
    right = '{"team":"billing","order":"48213","urgent":true,"item":"tent"}'
    answers = [right, right.replace("billing", "returns"), "no ticket", "[1]", "7"]
    assert rewards.right_fields(answers, [right] * 5) == [1, 0.75, 0, 0, 0]
    assert rewards.right_fields([right], [None]) == [0]
    assert rewards.is_json(answers) == [1, 1, 0, 0, 0]
