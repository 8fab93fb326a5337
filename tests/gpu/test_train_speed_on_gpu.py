"""The fast path of training against the plain one on a GPU: kernels, products, steps.

Run there with ``python3 -m pytest -m gpu tests/gpu/test_train_speed_on_gpu.py``. Needs torch, transformers and peft of
the host, and the toolkit's core; the case over NF4 needs bitsandbytes.
"""

import json
import shutil

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU on this machine"),
]

SHAPE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "initializer_range": 0.05, "tie_word_embeddings": False,
}  # fmt: skip


def apart(got, wanted) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("tokens", "outputs", "ranks"), [(1000, 3000, 48), (129, 4096, 16), (64, 65, 8)]
)
def test_a_thin_product_is_added_as_in_float64(tokens, outputs, ranks):
    import torch

    from toolkit.train.speed.kernels import add_thin

    base, c, b = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((tokens, outputs), (tokens, ranks), (outputs, ranks))
    )
    wanted = base.double() + c.double() @ b.double().T
    assert apart(add_thin(base.clone(), c, b.t()), wanted) < 4e-3


@pytest.mark.parametrize(("tokens", "inner", "ranks"), [(1000, 1536, 32), (77, 200, 8)])
def test_a_gated_block_and_its_gradient_are_those_of_float64(tokens, inner, ranks):
    import torch

    from toolkit.train.speed import fp8, gated

    y, h, b, grad, c, d = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / 2
        for shape in ((tokens, 2 * inner), (tokens, ranks), (2 * inner, ranks), (tokens, inner),
                      (tokens, 16), (16, inner))
    )  # fmt: skip
    times = torch.rand(2 * inner, device="cuda") + 0.5
    wide = (y.double() + h.double() @ b.double().T).requires_grad_()
    gate, up = wide.chunk(2, -1)
    wanted = torch.nn.functional.silu(gate) * up
    (slope,) = torch.autograd.grad(wanted, wide, grad.double() + c.double() @ d.double())
    v, of_v = gated.gated(y, h, b, True)
    dy, db, da, largest = gated.gated_backward(grad, c, d, y, h, b, times)
    q, scale, thin = gated.quantize_thin(dy, times, largest, b)
    stored, row_scale = fp8.quantize_rows(dy * times)
    assert max(apart(v, wanted), apart(dy, slope)) < 4e-3
    assert max(apart(db, slope.T @ h.double()), apart(da, c.double().T @ wanted)) < 8e-3
    assert apart(of_v, v.abs().amax(1)) < 4e-3  # before and after it is rounded to bf16
    assert apart(scale, row_scale) < 4e-3
    back = q.double() * scale.double()[:, None]
    assert apart(back, stored.double() * row_scale.double()[:, None]) < 2e-2
    assert apart(back, dy.double() * times.double()) < 4e-2
    assert apart(thin, dy.double() @ b.double()) < 4e-3


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 3.0)])
def test_cross_entropy_and_its_gradient_are_those_of_float64(scale, cap):
    import torch

    from toolkit.train.speed.loss import entropy_and_gradient
    from toolkit.train.speed.loss_kernel import entropy_

    logits = torch.randn(50, 30_001, device="cuda", dtype=torch.bfloat16) * 3
    targets = torch.randint(0, 30_001, (50,), device="cuda")
    wanted, slope = entropy_and_gradient(logits.double(), targets, scale, cap)
    loss = entropy_(logits, targets, scale, cap).sum()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert apart(logits, slope) < 4e-3


def test_bytes_are_transposed():
    import torch

    from toolkit.train.speed.kernels import turn

    matrix = torch.randint(0, 256, (1000, 515), device="cuda", dtype=torch.uint8)
    assert torch.equal(turn(matrix), matrix.t())


def test_packed_attention_is_that_of_float64_by_rows():
    import numpy as np
    import torch

    from toolkit.train.speed.attention import packed, row_bounds

    lengths = (300, 1, 77, 646)
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    bounds, longest = row_bounds(positions)
    made = [
        torch.randn(1024, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)
    ]
    results = []
    for device, kind in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        given = [one.detach().to(device, kind).requires_grad_() for one in made]
        out = packed(*given, torch.from_numpy(bounds).to(device), longest, 0.125)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for got, wanted in zip(*results, strict=True):
        assert apart(got.cpu(), wanted) < 2e-2


def test_an_fp8_product_and_its_gradient_are_those_of_the_stored_weights():
    import torch

    from toolkit.train.speed import fp8

    weight = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    stored, scale = fp8.quantize_rows(weight)
    meant = stored.double() * scale.double()[:, None]
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    none = torch.empty(300, 0, device="cuda", dtype=torch.bfloat16)
    y = fp8.product(x, (stored, scale), none, none.new_empty(0, 512), 0)
    dx = fp8.gradient(dy, (stored, scale), none, none.new_empty(0, 256))
    assert apart(y, x.double() @ meant.T) < 4e-2
    assert apart(dx, dy.double() @ meant) < 4e-2


@pytest.mark.parametrize(
    ("kind", "keep"), [("bf16", "auto"), ("bf16", True), ("fp8", "auto"), ("nf4", "auto")]
)
def test_fifty_compiled_steps_are_those_of_the_plain_path(kind, keep, tmp_path):
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from toolkit.data.store import TokenRow, TokenStore
    from toolkit.recipe.train import TrainSection
    from toolkit.train.batches import collate
    from toolkit.train.loss import summed_loss
    from toolkit.train.model import build_model, numerics_for, trainable

    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"]
    random = np.random.default_rng(1)
    rows = [
        TokenRow(random.integers(3, 500, n).astype(np.int32), (np.arange(n) > 3) & (i != 1))
        for i, n in enumerate(random.integers(5, 400, 12))
    ]
    TokenStore.write(tmp_path / "rows", rows)
    store = TokenStore(tmp_path / "rows")
    batches = [[[0, 1, 2], [3, 4]], [[5], [6], [1]], [[7, 8, 9, 10, 11]]]
    if (kind, keep) != ("bf16", "auto"):
        batches = batches[:1]  # every further shape is compiled anew, and is no other code
    seen = {}
    for speed in ("plain", "auto"):
        torch.manual_seed(3)
        method = {"nf4": "qlora"}.get(kind, "lora")
        base = {"fp8": "fp8"}.get(kind, "auto")
        config = TrainSection(
            method=method, base_precision=base, speed=speed, gradient_checkpointing=keep
        )
        facts = {"source": "test"}
        model = build_model(tmp_path / "base", config, numerics_for(config, "cuda"), "cuda", facts)
        assert hasattr(model, "speed") == (speed == "auto")
        weights = [weight for _, weight in trainable(model)]
        optimizer = torch.optim.AdamW(weights, lr=1e-3)
        seen[speed] = []
        for step in range(50):
            batch = collate(store, batches[step % len(batches)])
            loss = summed_loss(model, batch) / batch.trained_tokens
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen[speed].append((float(loss.detach()), float(norm)))
        if speed == "auto":
            assert model.speed.gave_up is None
    plain, fast = (np.array(seen[speed]) for speed in ("plain", "auto"))
    np.testing.assert_allclose(fast[:, 0], plain[:, 0], rtol=2e-2)
    np.testing.assert_allclose(np.median(fast[:, 1] / plain[:, 1]), 1.0, atol=5e-2)
