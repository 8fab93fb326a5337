"""Pairs for the demo: the right ticket of a request, and one with a single mistake in it; or single marked tickets."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import tickets

Row = dict[str, Any]


def train_pairs(rows: int, seed: int) -> Iterator[Row]:
    """Yield ``rows`` pairs of the training wordings; equal arguments give equal rows."""
    rng = random.Random(f"pairs {seed}")
    for row in tickets.train_rows(rows, seed):
        yield _pair(row, rng)


def heldout_pairs(rows: int, seed: int) -> Iterator[Row]:
    """Yield ``rows`` pairs whose wordings and values training never sees."""
    rng = random.Random(f"held-out pairs {seed}")
    for row in tickets.heldout_rows(rows, seed):
        yield _pair(row, rng)


def train_marked(rows: int, seed: int) -> Iterator[Row]:
    """Yield ``rows`` tickets of the training wordings, in turn right and wrong, each marked so."""
    return _marked(train_pairs(rows, seed))


def heldout_marked(rows: int, seed: int) -> Iterator[Row]:
    """Yield ``rows`` marked tickets whose wordings and values training never sees."""
    return _marked(heldout_pairs(rows, seed))


def _marked(pairs: Iterator[Row]) -> Iterator[Row]:
    for number, pair in enumerate(pairs):
        right = number % 2 == 0
        answer = pair["chosen"] if right else pair["rejected"]
        yield {"prompt": pair["prompt"], "completion": answer, "label": right}


def _pair(row: tickets.Row, rng: random.Random) -> Row:
    question, answer = row["messages"]
    ticket = json.loads(answer["content"])
    wrong = json.dumps(ticket | _mistake(ticket, rng), separators=(",", ":"))
    return {"prompt": [question], "chosen": answer["content"], "rejected": wrong}


def _mistake(ticket: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Another team, the other urgency, or two digits of the order exchanged."""
    teams = sorted(set(tickets.TRAIN.complaints) - {ticket["team"]})
    order = ticket["order"]
    swapped = order[1] + order[0] + order[2:]
    mistakes: list[dict[str, Any]] = [
        {"team": rng.choice(teams)},
        {"urgent": not ticket["urgent"]},
    ]
    if swapped != order:
        mistakes.append({"order": swapped})
    return rng.choice(mistakes)
