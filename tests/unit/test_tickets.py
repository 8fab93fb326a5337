"""The demo's data: seeded, balanced, and nothing held out is ever trained."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[2] / "recipes" / "demo" / "tickets.py"
ROWS = 1500


def load() -> ModuleType:
    """Load the generator by path, as the data stage does."""
    import sys

    spec = importlib.util.spec_from_file_location("tickets", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tickets"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tickets() -> ModuleType:
    return load()


@pytest.fixture(scope="module")
def rows(tickets: ModuleType) -> dict[str, list[dict]]:
    return {
        "train": list(tickets.train_rows(ROWS, seed=1)),
        "heldout": list(tickets.heldout_rows(ROWS, seed=1)),
    }


def answers(rows: list[dict]) -> list[dict]:
    return [json.loads(row["messages"][-1]["content"]) for row in rows]


def wordings(rows: list[dict]) -> set[str]:
    """Every sentence of the requests, with the values taken out."""
    found, tickets = set(), load()
    for row in rows:
        ticket = json.loads(row["messages"][-1]["content"])
        text = row["messages"][0]["content"]
        for item in (*tickets.TRAIN.items, *tickets.HELDOUT.items):
            text = re.sub(rf"\b{item}\b", "{item}", text)
        text = text.replace(ticket["order"], "{order}")
        found |= {sentence.strip().lower() for sentence in re.split(r"(?<=[.?]) ", text)}
    return found


def test_equal_seeds_give_equal_rows(tickets: ModuleType) -> None:
    assert list(tickets.train_rows(50, seed=3)) == list(tickets.train_rows(50, seed=3))
    assert list(tickets.heldout_rows(50, seed=3)) == list(tickets.heldout_rows(50, seed=3))


def test_other_seeds_give_other_rows(tickets: ModuleType) -> None:
    assert list(tickets.train_rows(50, seed=3)) != list(tickets.train_rows(50, seed=4))


def test_more_rows_begin_with_the_same_rows(tickets: ModuleType) -> None:
    assert list(tickets.train_rows(60, seed=1))[:20] == list(tickets.train_rows(20, seed=1))


def test_no_heldout_wording_is_trained(rows: dict[str, list[dict]]) -> None:
    assert not wordings(rows["train"]) & wordings(rows["heldout"])


def test_no_heldout_value_is_trained(tickets: ModuleType, rows: dict[str, list[dict]]) -> None:
    trained = {ticket["order"] for ticket in answers(rows["train"])}
    assert not trained & {ticket["order"] for ticket in answers(rows["heldout"])}
    assert not set(tickets.TRAIN.items) & set(tickets.HELDOUT.items)


def test_parts_are_disjoint_before_any_row_is_made(tickets: ModuleType) -> None:
    train, heldout = tickets.TRAIN, tickets.HELDOUT
    for name in ("references", "urgent", "calm", "openings", "items"):
        assert not set(getattr(train, name)) & set(getattr(heldout, name)), name
    for team in train.complaints:
        assert not set(train.complaints[team]) & set(heldout.complaints[team]), team
    assert set(train.complaints) == set(heldout.complaints)


def test_the_order_number_stands_in_the_request(rows: dict[str, list[dict]]) -> None:
    for row in rows["train"] + rows["heldout"]:
        ticket = json.loads(row["messages"][-1]["content"])
        assert ticket["order"] in row["messages"][0]["content"]


def test_teams_and_urgency_are_balanced(rows: dict[str, list[dict]]) -> None:
    for split in rows.values():
        tickets = answers(split)
        for team in {ticket["team"] for ticket in tickets}:
            assert sum(t["team"] == team for t in tickets) == ROWS / 4
        assert 0.4 < sum(t["urgent"] for t in tickets) / ROWS < 0.6


def test_the_most_common_answer_is_rare(rows: dict[str, list[dict]]) -> None:
    given = [row["messages"][-1]["content"] for row in rows["heldout"]]
    assert max(given.count(answer) for answer in set(given)) <= 2


def test_answers_are_compact_json_with_four_keys(rows: dict[str, list[dict]]) -> None:
    for row in rows["heldout"][:100]:
        text = row["messages"][-1]["content"]
        ticket = json.loads(text)
        assert list(ticket) == ["team", "urgent", "order"]
        assert text == json.dumps(ticket, separators=(",", ":"))
