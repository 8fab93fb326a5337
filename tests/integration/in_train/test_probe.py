"""``--probe``: two steps on the worst batch, and nothing is kept."""

import json

import numpy as np
import pytest
import torch

from toolkit.data.store import TokenRow, TokenStore
from toolkit.errors import StepFailedError
from toolkit.stages import Input, Kind
from toolkit.stages.train import Train
from toolkit.train import sft

pytestmark = pytest.mark.integration


@pytest.fixture
def one_long_row(tmp_path):
    """Twenty short rows, and one of 40 tokens."""
    lengths = [8] * 20 + [40]
    rows = [TokenRow(np.arange(n, dtype=np.int32) % 90, np.arange(n) >= 3) for n in lengths]
    folder = tmp_path / "rows"
    for side in ("train", "heldout"):
        TokenStore.write(folder / "tokens" / side, rows)
    return Input(folder, Kind.dataset, "d" * 64, {})


def test_the_probe_takes_two_steps_on_the_worst_batch(
    train_config, context, one_long_row, monkeypatch
):
    seen = []
    gradients = sft.gradients

    def watched(engine, step, *args, **kwargs):
        seen.append(step)
        return gradients(engine, step, *args, **kwargs)

    monkeypatch.setattr(sft, "gradients", watched)
    ctx = context(probe=True)
    ctx.inputs["dataset"] = one_long_row
    result = Train().run(train_config(packing=False, batch_size=2, max_steps=500), ctx)
    assert len(seen) == 2
    assert all(20 in step.rows for step in seen)
    assert result.facts["batch"] == "2 x 40 tokens (42 trained)"
    assert result.facts["total_bytes"] == sum(result.facts["parts_bytes"].values())
    assert result.metrics["loss"] > 0
    assert list(ctx.output.iterdir()) == []
    assert list(ctx.state.iterdir()) == []


def test_accumulation_is_probed_with_gradients_in_memory(train_config, context, monkeypatch):
    seen = []
    gradients = sft.gradients

    def watched(engine, step, *args, **kwargs):
        seen.append(step)
        return gradients(engine, step, *args, **kwargs)

    monkeypatch.setattr(sft, "gradients", watched)
    Train().run(train_config(gradient_accumulation=4), context(probe=True))
    assert [len(step.batches) for step in seen] == [2, 2]


def test_a_probe_that_runs_out_says_what_took_it_whatever_on_oom_says(
    train_config, context, monkeypatch
):
    build = sft.build_model

    def full(*args, **kwargs):
        model = build(*args, **kwargs)

        def refuse(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0")

        model.register_forward_pre_hook(refuse)
        return model

    monkeypatch.setattr(sft, "build_model", full)
    with pytest.raises(StepFailedError, match="out of GPU memory at step 1") as error:
        Train().run(train_config(on_oom="halve_batch"), context(probe=True))
    assert "forecast for the largest micro-batch" in error.value.message
    assert json.dumps(error.value.hint)
