"""The forecast against what a GPU measured (benchmarks/train/forecast.py)."""

import json
from pathlib import Path

import pytest

from toolkit.forecast.block import Rows
from toolkit.forecast.parts import CONTEXT_BYTES
from toolkit.forecast.training import Setup, forecast
from toolkit.preflight.base_facts import BaseFacts, shape_of

FILE = Path("docs/measurements/training-memory-h200-2026-11-22.json")
RUN = json.loads((Path(__file__).parents[2] / FILE).read_text())


def setup_of(case):
    shape = shape_of(BaseFacts(RUN["shapes"][case["shape"]]))
    targets = shape.linears if case["targets"] == "all-linear" else case["targets"]
    tokens = case["batch"] * case["length"]
    rows = Rows(case["batch"], case["length"], int(tokens * case["trained"]), case["packed"])
    return Setup(
        shape,
        case["method"],
        "nf4" if case["method"] == "qlora" else "bf16",
        2,
        rows,
        tuple(targets),
        case["rank"],
        case["keep"],
        optimizer=case["optimizer"],
    )


@pytest.mark.parametrize("one", RUN["results"], ids=lambda one: one["case"]["label"])
def test_the_forecast_is_what_was_measured(one):
    found = forecast(setup_of(one["case"]))
    tensors = found.total - CONTEXT_BYTES - found.bytes_of("fragmentation")
    assert tensors == pytest.approx(one["measured"]["allocated"], rel=0.02)
    assert found.total == pytest.approx(one["measured"]["used"], rel=0.10)


def test_there_are_enough_of_them():
    assert len(RUN["results"]) >= 12
