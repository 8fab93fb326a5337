"""A base that is quantized while it is loaded is never whole in 16 bits: 70B would be 140 GB."""

import gc
import weakref

import pytest
import torch

from toolkit.train.model import Numerics, load_base

pytestmark = pytest.mark.integration


def test_weights_are_quantized_one_by_one_while_they_are_read(base, monkeypatch):
    from transformers import core_model_loading

    read = core_model_loading._materialize_copy
    made: list[tuple[int, weakref.ref]] = []
    most = 0

    def watched(tensor, *args, **named):
        nonlocal most
        found = read(tensor, *args, **named)
        gc.collect()
        made.append((found.numel(), weakref.ref(found)))
        alive = [size for size, held in made if held() is not None and held().is_floating_point()]
        most = max(most, sum(alive))
        return found

    monkeypatch.setattr(core_model_loading, "_materialize_copy", watched)
    model = load_base(base, Numerics("bf16", quantized=True), "cpu")
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    sizes = [layer.in_features * layer.out_features for layer in layers]
    assert len(layers) == 14
    assert all(layer.weight.dtype == torch.uint8 for layer in layers)
    kept = sum(size for size, held in made if held() is not None)
    assert most <= kept + 2 * max(sizes)
    assert most < kept + sum(sizes) / 2
