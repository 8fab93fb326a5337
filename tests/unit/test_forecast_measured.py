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


PROBE = Path(__file__).parents[2] / "benchmarks/train/results/probe-2026-11-22-h200.jsonl"
FAST = {
    "bf16 b3": ("bf16", 3),
    "bf16 b4": ("bf16", 4),
    "fp8 b3": ("fp8", 3),
    "fp8 b5": ("fp8", 5),
    "nf4 b3": ("nf4", 3),
}


@pytest.mark.parametrize("name", FAST)
def test_the_forecast_of_the_fast_path_is_what_was_measured(name):
    """Those formulas were read from the source; no number of the run went into them."""
    seen = {
        row["name"]: row for row in map(json.loads, PROBE.read_text().splitlines()) if "name" in row
    }
    base, batch = FAST[name]
    shape = shape_of(BaseFacts(RUN["shapes"]["8B"]))
    rows = Rows(batch, 4096, batch * 4096)
    method = "qlora" if base == "nf4" else "lora"
    targets = tuple(shape.linears)
    found = forecast(Setup(shape, method, base, 2, rows, targets, 16, "products", fused=True))
    tensors = found.total - CONTEXT_BYTES - found.bytes_of("fragmentation")
    assert tensors / 1e9 == pytest.approx(seen[name]["peak_gb"], rel=0.02)
