"""The fast path equals the plain one: by step, by kind of base, by architecture; on a CPU, small."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.data.store import TokenRow, TokenStore
from toolkit.recipe.train import TrainSection
from toolkit.train.batches import collate
from toolkit.train.loss import summed_loss
from toolkit.train.model import Numerics, add_adapter, build_model, trainable
from toolkit.train.speed import fp8
from toolkit.train.speed.apply import Speed, compiling, group_layers
from toolkit.train.speed.attention import packed, row_bounds
from toolkit.train.speed.choose import FAMILIES, Choice, Machine, choose
from toolkit.train.speed.linear import LoraProduct
from toolkit.train.speed.loss import AfterHead, HeadLoss

FAST = Choice(True, True, "a test says so")
TINY = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "head_dim": 16, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def uncompiled(monkeypatch):
    """What is compiled is tested by one test below; the others need not wait for it."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def rows(tmp_path):
    """Uneven rows; the second has no trained token."""
    random = np.random.default_rng(5)
    made = []
    for number, length in enumerate((17, 9, 30, 5, 12, 24)):
        trained = np.arange(length) >= 3
        made.append(
            TokenRow(random.integers(3, 96, length).astype(np.int32), trained & (number != 1))
        )
    TokenStore.write(tmp_path / "rows", made)
    return TokenStore(tmp_path / "rows")


BATCHES = {"packed": [[0, 1, 2], [3, 4, 5]], "uneven": [[2], [0], [1]], "one": [[5]]}


def trained(model, store, order, steps=4):
    """Losses and gradient norms by step."""
    weights = [w for _, w in trainable(model)]
    optimizer = torch.optim.AdamW(weights, lr=5e-3)
    seen = []
    for step in range(steps):
        batch = collate(store, BATCHES[order[step % len(order)]])
        loss = summed_loss(model, batch) / batch.trained_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((float(loss.detach()), float(norm)))
    return np.array(seen)


def speed_up(model, kind="bf16", **changes):
    model.speed = Speed(model, TrainSection(**changes), FAST, kind)
    return model


@pytest.fixture
def build(base):
    """The same model each time: adapters begin with the same numbers, B not at zero."""

    def made(precision="fp32", **changes):
        torch.manual_seed(3)
        config = TrainSection(**({"lora": {"rank": 4}, "speed": "plain"} | changes))
        numerics = Numerics(precision, config.method == "qlora", config.base_precision == "fp8")
        model = build_model(base, config, numerics, "cpu", {"source": "test"})
        torch.manual_seed(4)
        for name, weight in trainable(model):
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        return model

    return made


ALL = ["packed", "one", "uneven"]


def test_fifty_steps_are_those_of_the_plain_path(build, rows, uncompiled):
    plain = trained(build(), rows, ALL, steps=50)
    fast = trained(speed_up(build()), rows, ALL, steps=50)
    np.testing.assert_allclose(fast, plain, rtol=5e-3)


@pytest.mark.parametrize("keep", ["everything", "products", "but_mlp", "attention", "nothing"])
def test_whatever_layers_keep_the_gradients_are_the_same(build, rows, uncompiled, keep):
    plain, fast = trained(build(), rows, ALL, steps=3), speed_up(build())
    fast.speed._keep = lambda _tokens: [keep, "products"]
    np.testing.assert_allclose(trained(fast, rows, ALL, steps=3), plain, rtol=1e-4)


def test_in_bf16_they_agree_to_what_bf16_can_say(build, rows, uncompiled):
    plain = trained(build("bf16"), rows, ["packed", "uneven"])
    fast = trained(speed_up(build("bf16")), rows, ["packed", "uneven"])
    np.testing.assert_allclose(fast[:, 0], plain[:, 0], rtol=2e-2)
    np.testing.assert_allclose(fast[:, 1], plain[:, 1], rtol=6e-2)


def test_over_an_fp8_base_they_are_the_same(build, rows, uncompiled):
    plain = trained(build(base_precision="fp8"), rows, ["packed", "uneven"])
    fast = trained(speed_up(build(), "fp8"), rows, ["packed", "uneven"])
    # gradients of layers with the same input share one scale a token there, and have their own here
    np.testing.assert_allclose(fast[:, 0], plain[:, 0], rtol=2e-2)
    np.testing.assert_allclose(fast[:, 1], plain[:, 1], rtol=8e-2)


def test_over_an_nf4_base_they_are_the_same(build, rows, uncompiled):
    plain = trained(build(method="qlora"), rows, ["packed", "uneven"])
    fast = trained(speed_up(build(method="qlora"), "nf4"), rows, ["packed", "uneven"])
    np.testing.assert_allclose(fast, plain, rtol=2e-3)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_named_architecture_gives_the_same_loss_and_gradients(name, rows, uncompiled):
    kind = name.removesuffix("ForCausalLM").lower()
    kind = {"gemma3": "gemma3_text"}.get(kind, kind)
    config = AutoConfig.for_model(kind, **TINY)

    def made():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation="sdpa"
        ).eval()
        assert type(model).__name__ == name
        model = add_adapter(model, TrainSection(lora={"rank": 4}).lora, "test", Path())
        for key, weight in trainable(model):
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.05)
        return model.train()

    choice = choose(
        TrainSection(), config.to_dict() | {"architectures": [name]}, Machine("cuda", 9.0)
    )
    assert choice.fast
    plain, fast = made(), made()
    fast.speed = Speed(fast, TrainSection(), choice, "bf16")
    for sequences in BATCHES.values():
        batch = collate(rows, sequences)
        losses = [summed_loss(model, batch) for model in (plain, fast)]
        values = [float(loss.detach()) for loss in losses]
        assert values[1] == pytest.approx(values[0], rel=1e-5)
        for loss in losses:
            loss.backward()
    for (key, one), (_, other) in zip(trainable(plain), trainable(fast), strict=True):
        assert float((one.grad - other.grad).norm()) <= 2e-4 * float(one.grad.norm()) + 1e-6, key


def test_layers_that_share_an_input_are_one_product(build):
    model = speed_up(build())
    assert len(model.speed.groups) == 2 * 4  # q k v, o, gate up, down
    attention = model.get_base_model().model.layers[0].self_attn
    merged = attention.speed_group.frozen[0]
    base = attention.v_proj.get_base_layer().weight
    assert base.untyped_storage().data_ptr() == merged.untyped_storage().data_ptr()


def test_the_adapter_can_be_switched_off(build, rows, uncompiled):
    fast, plain = speed_up(build()), build()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), fast.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(fast(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_dropout_reaches_the_adapter_and_only_in_training(build, rows, uncompiled):
    lora = {"rank": 4, "dropout": 0.5}
    fast = speed_up(build(lora=lora))
    batch = collate(rows, BATCHES["packed"])
    noisy = {float(summed_loss(fast, batch).detach()) for _ in range(2)}
    fast.eval()
    with torch.no_grad():
        quiet = float(summed_loss(fast, batch))
        plain = float(summed_loss(build(lora=lora).eval(), batch))
    assert len(noisy) == 2
    assert quiet == pytest.approx(plain, rel=1e-5)


def test_dropout_gives_the_gradient_of_what_was_kept():
    torch.manual_seed(0)
    x, z = (torch.randn(7, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a, b = torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    w = torch.randn(5, 8, dtype=torch.float64)
    a.requires_grad_(), b.requires_grad_()

    def product(x, z, a, b):
        return LoraProduct.apply(x, z, a, b, 2.0, "bf16", 0, w)

    torch.testing.assert_close(product(x, z, a, b), x @ w.T + 2.0 * z @ a.T @ b.T)
    assert torch.autograd.gradcheck(product, (x, z, a, b))
    assert torch.autograd.gradcheck(lambda x, a, b: product(x, None, a, b), (x, a, b))


def test_the_folder_that_is_saved_is_the_same(build, tmp_path):
    build().save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    speed_up(build()).save_pretrained(tmp_path / "fast", save_embedding_layers=False)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert json.loads((tmp_path / "fast" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_layers_of_one_policy_are_one_compiled_program(build, rows, monkeypatch):
    from torch._dynamo.utils import counters

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled(f, backend="aot_eager", **k))
    torch._dynamo.reset()
    counters.clear()
    model = speed_up(build())
    model.speed._keep = lambda _tokens: ["attention", "products"]
    losses = trained(model, rows, ["packed"], steps=2)
    assert model.speed.gave_up is None
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # one for each policy
    np.testing.assert_allclose(losses, trained(build(), rows, ["packed"], steps=2), rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("keep", "numbers"), [("nothing", 0), ("attention", 64 + 4)])
def test_the_compiler_keeps_no_more_than_it_is_told(build, rows, monkeypatch, keep, numbers):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    kept = []

    def forward(program, _inputs):
        (results,) = next(n for n in program.graph.nodes if n.op == "output").args
        values = [n.meta["val"] for n in results if hasattr(n, "meta") and n.op != "placeholder"]
        kept.append([v.numel() for v in values if getattr(v, "dtype", None) == torch.float32])
        return program.forward

    backend = aot_autograd(
        fw_compiler=forward, bw_compiler=lambda program, _inputs: program.forward,
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled(f, backend=backend))
    torch._dynamo.reset()
    model = speed_up(build())
    model.speed._keep = lambda _tokens: [keep, keep]
    trained(model, rows, ["packed"], steps=1)
    assert model.speed.gave_up is None
    batch = collate(rows, BATCHES["packed"])
    result, *others = kept[0]
    assert result == batch.ids.size * 64  # what the layer gives
    thin = 0 if keep == "nothing" else 4 * (3 + 1 + 2 + 1)  # x A^T of rank 4, seven adapters
    assert sum(others) == batch.ids.size * (numbers + thin)


def test_a_compiler_that_fails_is_given_up_and_training_goes_on(build, rows, monkeypatch):
    def broken(_function, **_):
        def fail(*_args, **_kwargs):
            raise torch._dynamo.exc.Unsupported("no such thing")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    model, said = speed_up(build()), []
    model.speed.say = said.append
    losses = trained(model, rows, ["packed"], steps=2)
    assert model.speed.gave_up == "Unsupported: no such thing"
    assert said[1:] == [
        "the compiler failed, layers run slower without it: Unsupported: no such thing"
    ]
    np.testing.assert_allclose(losses, trained(build(), rows, ["packed"], steps=2), rtol=1e-4)


def test_before_the_first_step_it_says_once_that_layers_are_compiled(
    build, rows, uncompiled, monkeypatch, tmp_path
):
    kept, said = tmp_path / "inductor", []
    for files in (0, 2):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(kept))
        model = speed_up(build())
        model.speed.say = said.append
        trained(model, rows, ["one", "packed"], steps=2)
        (kept / "fxgraph").mkdir(parents=True, exist_ok=True)
        for number in range(2 - files):
            (kept / "fxgraph" / str(number)).touch()
    assert said == [
        f"compiling layers for the first time, kept in {kept}",
        f"compiling layers with 2 files of earlier runs, kept in {kept}",
    ]
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert compiling() == (
        "compiling layers; later runs do it again: the cache folder cannot be written"
    )


@pytest.mark.parametrize("after", [AfterHead(), AfterHead(0.25, 0.0), AfterHead(1.0, 3.0)])
def test_head_and_loss_are_those_of_float64(after):
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    head = torch.randn(50, 16, dtype=torch.float64)
    targets = torch.randint(0, 50, (37,))
    logits = hidden @ head.T * after.scale
    if after.cap:
        logits = after.cap * torch.tanh(logits / after.cap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(expected / 37, hidden)
    loss = HeadLoss.apply(hidden, head, targets, after, 8)
    (got,) = torch.autograd.grad(loss / 37, hidden)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, wanted)


def test_packed_attention_is_that_of_float64_with_a_mask():
    torch.manual_seed(0)
    q = torch.randn(30, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(30, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    positions = np.concatenate([np.arange(11), np.arange(1), np.arange(18)])[None]
    bounds, longest = row_bounds(positions)
    assert bounds[:4].tolist() == [0, 11, 12, 30]
    assert set(bounds[4:].tolist()) == {30}
    assert longest == 18
    out = packed(q, k, v, torch.from_numpy(bounds), longest, 0.3)
    row = torch.tensor(np.cumsum(positions[0] == 0))
    mask = (row[:, None] == row[None]) & torch.ones(30, 30, dtype=torch.bool).tril()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1),
        attn_mask=mask, scale=0.3, enable_gqa=True,
    ).transpose(0, 1)  # fmt: skip
    torch.testing.assert_close(out, wanted)
    grad = torch.randn_like(out)
    for one, other in zip(
        torch.autograd.grad(out, (q, k, v), grad),
        torch.autograd.grad(wanted, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_an_fp8_product_and_its_gradient_use_the_same_stored_weights():
    torch.manual_seed(0)
    weight = torch.randn(48, 32)
    stored, scale = fp8.quantize_rows(weight)
    meant = stored.double() * scale.double()[:, None]
    assert float((meant - weight).norm() / weight.norm()) < 0.03
    x, dy = torch.randn(20, 32), torch.randn(20, 48)
    nothing = torch.empty(20, 0)
    y = fp8.product(x, (stored, scale), nothing, torch.empty(0, 48), 0)
    dx = fp8.gradient(dy, (stored, scale), nothing, torch.empty(0, 32))
    twice = fp8.gradient(dy, (stored, scale, stored.t().contiguous()), nothing, torch.empty(0, 32))
    q, rows = fp8.quantize_rows(x)
    torch.testing.assert_close(
        y.double(), (q.double() * rows.double()[:, None]) @ meant.T, rtol=1e-4, atol=1e-4
    )
    assert float((dx.double() - dy.double() @ meant).norm() / dx.norm()) < 0.04
    torch.testing.assert_close(dx, twice)


def test_fp8_works_layer_by_layer_in_any_model(build):
    model = build(base_precision="fp8")
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    assert layer.get_base_layer().weight.dtype == torch.float8_e4m3fn
    assert group_layers(model, "fp8", merge=False)
