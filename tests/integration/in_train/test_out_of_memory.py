"""Training that runs out of memory: the cause is injected, all else is the real thing."""

import json

import pytest
import torch

from toolkit.errors import StepFailedError
from toolkit.stages.train import Train
from toolkit.train import sft

pytestmark = pytest.mark.integration


@pytest.fixture
def small_gpu(monkeypatch):
    """A model that holds no more than some sequences at once, as a small GPU would."""

    def holds(most, after=0):
        build = sft.build_model
        calls = iter(range(10**6))

        def limited(*args, **kwargs):
            model = build(*args, **kwargs)

            def check(_module, _args, kwargs):
                if model.training and next(calls) >= after and len(kwargs["input_ids"]) > most:
                    raise torch.OutOfMemoryError(
                        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"
                    )

            model.register_forward_pre_hook(check, with_kwargs=True)
            return model

        monkeypatch.setattr(sft, "build_model", limited)

    return holds


def test_halving_goes_on_with_the_same_steps(small_gpu, train_config, context, logged):
    config = train_config(batch_size=4, max_steps=4, packing=False, lora={"rank": 8, "alpha": 16})
    whole = context("whole")
    Train().run(config, whole)
    small_gpu(1)
    halved = context("halved")
    section = config.train.model_copy(update={"on_oom": "halve_batch"})
    result = Train().run(config.model_copy(update={"train": section}), halved)
    assert logged(halved.output, "loss") == pytest.approx(logged(whole.output, "loss"), rel=1e-4)
    norms = logged(whole.output, "grad_norm")
    assert logged(halved.output, "grad_norm") == pytest.approx(norms, rel=1e-3)
    assert logged(halved.output, "sequences_at_once") == [2.0, 1.0]
    assert logged(halved.output, "out_of_memory") == [1.0, 1.0]
    assert result.facts["row_order"]


def test_a_step_that_fails_late_is_repeated_on_the_same_weights(
    small_gpu, train_config, context, logged
):
    config = train_config(batch_size=2, max_steps=5, packing=False)
    whole = context("whole")
    facts = Train().run(config, whole).facts
    small_gpu(1, after=3)
    halved = context("halved")
    section = config.train.model_copy(update={"on_oom": "halve_batch"})
    result = Train().run(config.model_copy(update={"train": section}), halved)
    assert result.facts["row_order"] == facts["row_order"]
    assert logged(halved.output, "loss") == pytest.approx(logged(whole.output, "loss"), rel=1e-4)
    lines = [
        json.loads(line) for line in (halved.output / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "out_of_memory" in line["metrics"]] == [4]


def test_stopping_says_what_took_the_memory(small_gpu, train_config, context):
    small_gpu(1)
    with pytest.raises(StepFailedError) as error:
        Train().run(train_config(batch_size=2, packing=False), context())
    said = error.value.message
    assert said.startswith(
        "out of GPU memory at step 1, with 2 sequences at a time: CUDA out of memory"
    )
    assert "forecast for the largest micro-batch (2 x " in said
    assert all(f"{part} " in said for part in ("weights", "adapter", "optimizer", "activations"))
    assert error.value.hint.startswith(
        "train.on_oom: halve_batch goes on with smaller micro-batches"
    )


def test_what_cannot_be_halved_stops(small_gpu, train_config, context):
    small_gpu(0)
    with pytest.raises(StepFailedError) as error:
        Train().run(train_config(batch_size=2, on_oom="halve_batch"), context())
    assert "with 1 sequence at a time" in error.value.message
    assert "halve_batch" not in error.value.hint
