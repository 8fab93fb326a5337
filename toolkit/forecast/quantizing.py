"""Peak memory of making a quantized model, on one GPU. Pure.

The stage measures the full model before, and the quantized one (dequantized) after
(stages/quantize.py); between them llm-compressor has one block at a time on the GPU
(pipelines/sequential), and GPTQ three fp32 squares of the widest input: the Hessian, its inverse and
a factor (modifiers/gptq/gptq_quantize.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.forecast.block import FLOAT
from toolkit.forecast.parts import CONTEXT_BYTES, Forecast, parts
from toolkit.forecast.shape import ModelShape

MEASURED_ROWS = 8
"""Rows in one batch while perplexity is measured (quantizers/probe.py: BATCH_SIZE)."""
HESSIANS = 3
USES_HESSIANS = frozenset({"gptq", "int8"})


@dataclass(frozen=True)
class QuantizeSetup:
    """A method over a model.

    Attributes:
        shape: Of the model.
        method: As in the recipe.
        bits: Per weight.
        length: Tokens of the longest row.
        width: Bytes of a weight of the full model.
    """

    shape: ModelShape
    method: str
    bits: int
    length: int
    width: int = 2


def forecast(setup: QuantizeSetup, gpu_bytes: int | None = None) -> Forecast:
    """The larger of measuring the model and of quantizing a block."""
    most = max(_measuring(setup), _block(setup), key=lambda named: sum(named.values()))
    return Forecast(parts(**most, **{"CUDA context": CONTEXT_BYTES}), gpu_bytes)


def _measuring(setup: QuantizeSetup) -> dict[str, float]:
    """The whole model, and logits for every token of a batch with an fp32 copy for one row."""
    shape = setup.shape
    logits = shape.vocabulary * setup.length * (setup.width * MEASURED_ROWS + 3 * FLOAT)
    passing = (
        MEASURED_ROWS * setup.length * setup.width * (3 * shape.intermediate + 4 * shape.hidden)
    )
    return {
        "weights": setup.width * shape.weights,
        "logits": logits,
        "activations": 0,
        "fragmentation": 0.04 * (logits + passing),
    }


def _block(setup: QuantizeSetup) -> dict[str, float]:
    shape = setup.shape
    widest = max((inputs for _, inputs in shape.linears.values()), default=0)
    weights = (setup.width + FLOAT) * shape.block_weights  # and a copy in fp32 that is rounded
    if setup.method == "bnb":
        weights = (
            int(setup.bits / 8 * 1.06 * shape.linear_weights) + setup.width * shape.other_weights
        )
    hessians = HESSIANS * FLOAT * widest**2 if setup.method in USES_HESSIANS else 0
    passing = setup.length * setup.width * (3 * shape.intermediate + 6 * shape.hidden)
    return {"weights": weights, "hessians": hessians, "activations": passing}
