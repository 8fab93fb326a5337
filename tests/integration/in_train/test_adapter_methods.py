"""DoRA, PiSSA, LoftQ and LoRA+: PEFT's numbers, resumed as uninterrupted, and exported as trained."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import MAX_LENGTH
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file
from test_export import logits_of
from test_resume import run_until_crashed
from transformers import AutoModelForCausalLM

from toolkit.data.store import TokenStore
from toolkit.errors import ArtifactError, StepFailedError
from toolkit.recipe.train import LoraSection, TrainSection
from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.export import Export, ExportConfig
from toolkit.stages.train import Train, TrainConfig
from toolkit.train import convert, start
from toolkit.train.effect import row_logits
from toolkit.train.model import Numerics, add_adapter, load_base
from toolkit.train.optimizer import build_optimizer, set_learning_rate

pytestmark = pytest.mark.integration

RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {
    "dora": {"lora": {"rank": RANK, "alpha": ALPHA, "dora": True}},
    "qdora": {"method": "qlora", "lora": {"rank": RANK, "alpha": ALPHA, "dora": True}},
    "pissa": {"lora": {"rank": RANK, "alpha": ALPHA, "init": "pissa"}, "learning_rate": 3e-3},
    "pissa_niter": {
        "lora": {"rank": RANK, "alpha": ALPHA, "init": "pissa_niter_4", "rslora": True},
        "learning_rate": 3e-3,
    },
    "loftq": {
        "method": "qlora",
        "lora": {"rank": RANK, "alpha": ALPHA, "init": "loftq", "dropout": 0.1},
    },
    "loraplus": {"lora": {"rank": RANK, "alpha": ALPHA, "plus_ratio": 4}, "learning_rate": 3e-3},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, dataset):
    """Artifacts of whole runs, each trained once in this module; read them, or copy them."""
    made = {}

    def run(method, precision="fp32"):
        if (method, precision) not in made:
            root = tmp_path_factory.mktemp(method)
            inputs = {
                "model": Input(base, Kind.model, "b" * 64, {"source": "tests/small-llama"}),
                "dataset": Input(dataset, Kind.dataset, "d" * 64, {}),
            }
            for folder in ("output", "state"):
                (root / folder).mkdir()
            ctx = StageContext(inputs, root / "output", root / "state", root)
            result = Train().run(config_of(method, precision=precision), ctx)
            made[method, precision] = Input(ctx.output, Kind.adapter, "a" * 64, result.facts)
        return made[method, precision]

    return run


def config_of(method, **changes):
    values = {
        "max_steps": 8,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "checkpoint_every": 2,
        **METHODS[method],
        **changes,
    }
    return TrainConfig(train=TrainSection(**values), max_length=MAX_LENGTH, seed=3)


def row_of(ctx):
    return TokenStore(ctx.inputs["dataset"].path / "tokens" / "heldout")[3]


def plain_base(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


# --- PEFT's numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"dora": True}, {"use_dora": True}),
        ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
        ({"init": "pissa_niter_4"}, {"init_lora_weights": "pissa_niter_4"}),
        (
            {"init": "pissa", "rslora": True},
            {"init_lora_weights": "pissa", "use_rslora": True},
        ),
    ],
    ids=str,
)
def test_an_adapter_starts_as_in_peft(ours, theirs, context, base, tmp_path):
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, **theirs)
    torch.manual_seed(1)
    expected = get_peft_model(plain_base(base), settings)
    torch.manual_seed(1)
    lora = LoraSection(rank=RANK, alpha=ALPHA, **ours)
    model = load_base(base, Numerics("fp32", quantized=False), "cpu")
    adapted = add_adapter(model, lora, "base", base, tmp_path / start.FILE)
    mine, peft = dict(adapted.named_parameters()), dict(expected.named_parameters())
    assert mine.keys() == peft.keys()
    assert all(torch.equal(mine[name], peft[name]) for name in peft)
    row = row_of(context())
    assert (row_logits(adapted, row) - logits_of(base, row)).abs().max() < 1e-3


@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_training_steps_are_those_of_peft(method, context, base):
    """Three steps over one batch each, written down with PEFT and AdamW alone."""
    from toolkit.train.batches import collate, lengths_of, rows_with_targets
    from toolkit.train.loss import summed_loss
    from toolkit.train.order import plan_steps
    from toolkit.train.sft import seed_everything

    config = config_of(method, max_steps=3, schedule="constant", warmup=0.0)
    ctx = context()
    Train().run(config, ctx)
    seed_everything(config.seed)
    options = {"use_dora": True} if method == "dora" else {"init_lora_weights": "pissa"}
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, **options)
    model = get_peft_model(plain_base(base), settings).train()
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.train.learning_rate, weight_decay=0.0)
    store = TokenStore(ctx.inputs["dataset"].path / "tokens" / "train")
    usable = rows_with_targets(store)
    steps = plan_steps(usable, lengths_of(store, usable), config.train, config.max_length, 3)
    for step in steps:
        (sequences,) = step.batches
        batch = collate(store, sequences)
        (summed_loss(model, batch) / batch.trained_tokens).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    stored = load_file(ctx.output / "adapter_model.safetensors")
    mine = {name: stored[name] for name in stored if "lora_" in name}
    for name, weight in model.named_parameters():
        if weight.requires_grad and "magnitude" not in name:
            assert torch.allclose(mine[name.replace(".default", "")], weight, atol=1e-5), name


def test_loftq_takes_what_rounding_lost_as_peft_does(base):
    lora = LoraSection(rank=RANK, alpha=RANK, init="loftq")  # PEFT leaves the scale out: here 1
    model = load_base(base, Numerics("fp32", quantized=True), "cpu")
    adapted = add_adapter(model, lora, "base", base)
    layer = adapted.get_base_model().model.layers[0].mlp.down_proj
    from bitsandbytes.functional import dequantize_4bit

    weight = load_file(base / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    packed = layer.base_layer.weight
    lost = weight - dequantize_4bit(packed.data, packed.quant_state)
    theirs = _low_rank_decomposition(lost, RANK)
    ours = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(ours, theirs["L"] @ theirs["R"], atol=1e-5)
    assert torch.allclose(layer.lora_A["default"].weight.abs(), theirs["R"].abs(), atol=1e-4)


def test_loftq_brings_the_4_bit_base_nearer_whatever_the_scale(base, context):
    row = row_of(context())
    numerics = Numerics("fp32", quantized=True)
    exact = logits_of(base, row)
    rounded = row_logits(load_base(base, numerics, "cpu"), row)
    lora = LoraSection(rank=16, alpha=64, init="loftq")
    adapted = add_adapter(load_base(base, numerics, "cpu"), lora, "base", base)
    assert (row_logits(adapted, row) - exact).norm() < 0.8 * (rounded - exact).norm()


@pytest.mark.parametrize(
    ("decay", "dora"),
    [(0.0, True), (0.1, False)],  # PEFT decays DoRA's lengths too; we decay matrices alone
)
def test_loraplus_steps_as_pefts_optimizer(decay, dora, base):
    ratio, rate = 4.0, 1e-2
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=dora)
        models.append(get_peft_model(plain_base(base), settings))
    section = TrainSection(
        learning_rate=rate, weight_decay=decay, lora=LoraSection(plus_ratio=ratio)
    )
    ours = build_optimizer(models[0], section)
    set_learning_rate(ours, rate)
    theirs = create_loraplus_optimizer(
        models[1], torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay
    )
    ids = torch.arange(3, 40)[None]
    for _ in range(3):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    for (name, mine), peft in pairs:
        assert torch.allclose(mine, peft, atol=1e-6), name


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_loss_goes_down_and_the_artifact_says_how(method, trained, logged):
    adapter = trained(method)
    losses = logged(adapter.path, "loss")
    assert losses[-1] < 0.9 * losses[0]
    lora = config_of(method).train.lora
    assert (adapter.facts["dora"], adapter.facts["init"]) == (lora.dora, lora.init)
    assert adapter.facts["plus_ratio"] == lora.plus_ratio
    assert (adapter.path / start.FILE).is_file() == (lora.init != "default")


@pytest.mark.parametrize("method", ["dora", "pissa_niter", "loftq", "loraplus"])
def test_interrupted_and_resumed_is_the_same_run(method, trained, context, logged, monkeypatch):
    whole, config = trained(method).path, config_of(method)
    killed = context("killed")
    run_until_crashed(config, killed)
    killed.output.rename(killed.output.parent / "lost")
    # another machine's singular vectors need not be the same: they are not looked for again
    monkeypatch.setattr(torch.linalg, "svd", None)
    monkeypatch.setattr(torch, "svd_lowrank", None)
    resumed = context("killed")
    Train().run(config, resumed)
    assert logged(resumed.output, "loss") == logged(whole, "loss")
    for name in ("adapter_model.safetensors", start.FILE):
        if (whole / name).exists():
            assert (resumed.output / name).read_bytes() == (whole / name).read_bytes()


def test_without_resume_the_start_is_made_anew(context):
    config = config_of("pissa", max_steps=1)
    ctx = context("stopped")
    (ctx.state / start.FILE).write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"start_adapter.safetensors cannot be read"):
        Train().run(config, ctx)
    Train().run(config, dataclasses.replace(ctx, resume=False))
    assert (ctx.output / start.FILE).stat().st_size > 1000


def test_a_start_of_another_rank_is_refused(trained, context):
    ctx = context()
    shutil.copyfile(trained("pissa").path / start.FILE, ctx.state / start.FILE)
    with pytest.raises(ArtifactError, match="is the start of another adapter") as caught:
        Train().run(config_of("pissa", lora={"rank": 4, "init": "pissa"}), ctx)
    assert "train anew" in caught.value.hint


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_an_adapter_that_stayed_where_it_started_is_an_error(method, context):
    config = config_of(method, learning_rate=1e-45, max_steps=1)
    with pytest.raises(StepFailedError, match="all 14 adapter matrices B where they started"):
        Train().run(config, context())


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_makes_the_start_and_all_have_it(
    rank, base, tmp_path, monkeypatch
):
    """What is said to torch.distributed is recorded; other random numbers are other singular vectors."""
    lora, file = LoraSection(rank=4, init="pissa_niter_1"), tmp_path / start.FILE
    file.write_bytes(b"of an older run")

    def build(seed):
        torch.manual_seed(seed)
        model = load_base(base, Numerics("fp32", quantized=False), "cpu")
        return dict(add_adapter(model, lora, "base", base, file).named_parameters())

    if rank == 0:
        kept = []
        monkeypatch.setattr(start, "_rank", lambda: 0)
        monkeypatch.setattr(torch.distributed, "barrier", lambda: kept.append(file.stat().st_size))
        start.start_file(tmp_path, resume=False)
        build(0)
        assert kept[0] > 1000  # the others are let in when the start is there
        return
    monkeypatch.setattr(start, "_rank", lambda: 1)
    start.start_file(tmp_path, resume=False)
    assert file.is_file()  # it is for the first to remove
    made = []

    def first_process():
        file.unlink()
        monkeypatch.setattr(start, "_rank", lambda: None)
        made.append(build(0))

    monkeypatch.setattr(torch.distributed, "barrier", first_process)
    mine = build(1)
    assert all(torch.equal(weight, made[0][name]) for name, weight in mine.items())


# --- leaving training -----------------------------------------------------------------------------


def trained_forward(adapter, base, row):
    """The model as it was trained: on its NF4 base, or on what PiSSA left."""
    quantized = adapter.facts["trained_on"] == "nf4"
    model = load_base(base, Numerics(adapter.facts["precision"], quantized), "cpu")
    return row_logits(start.load_adapter(model, adapter.path), row)


@pytest.mark.parametrize(
    ("method", "precision"),
    [("dora", "fp32"), ("qdora", "fp32"), ("pissa_niter", "bf16"), ("loftq", "fp32")],
)
def test_merged_is_what_was_trained(method, precision, trained, context, base):
    adapter, row = trained(method, precision), row_of(context())
    ctx = context("export", adapter=adapter)
    result = Export().run(
        ExportConfig(format="merged", dtype="fp32", method=adapter.facts["method"]), ctx
    )
    expected = trained_forward(adapter, base, row)
    allowed = 1e-3 if precision == "fp32" else 0.5  # bf16 activations round
    assert (logits_of(ctx.output, row) - expected).abs().max() < allowed
    assert result.metrics["merge_error"] < 1e-3
    assert (expected - logits_of(base, row)).abs().max() > 0.5  # training did something
    assert result.facts["init"] == adapter.facts["init"]


@pytest.mark.parametrize(("method", "precision"), [("pissa", "fp32"), ("pissa_niter", "bf16")])
def test_pissa_leaves_as_a_plain_adapter_of_the_same_function(
    method, precision, trained, context, base
):
    adapter, row = trained(method, precision), row_of(context())
    ctx = context("export", adapter=adapter)
    result = Export().run(ExportConfig(format="adapter"), ctx)
    settings = json.loads((ctx.output / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] is True
    assert (settings["r"], settings["use_rslora"]) == (2 * RANK, False)
    assert not (ctx.output / start.FILE).exists()
    served = row_logits(PeftModel.from_pretrained(plain_base(base), ctx.output), row)
    trained_logits = trained_forward(adapter, base, row)
    error = (served - trained_logits).abs().max()
    assert error < (1e-3 if precision == "fp32" else 0.5)  # bf16 activations round
    assert (served - logits_of(base, row)).abs().max() > 3 * error
    assert result.metrics["conversion_error"] <= result.metrics["conversion_tolerance"]
    assert result.facts["rank"] == 2 * RANK
    assert result.facts["converted_from"] == adapter.facts["init"]


def test_a_conversion_that_is_not_equal_is_refused(trained, context, monkeypatch):
    monkeypatch.setattr(convert, "TOLERANCE", -1.0)
    monkeypatch.setattr(convert, "ROUNDING", -1.0)
    ctx = context("export", adapter=trained("pissa"))
    with pytest.raises(StepFailedError, match="is not the trained model: a logit differs") as error:
        Export().run(ExportConfig(format="adapter"), ctx)
    assert "export.formats: [merged]" in error.value.hint


def test_another_start_than_was_trained_from_is_found_by_the_comparison(
    trained, context, monkeypatch
):
    """What the comparison is for: one layer's start is subtracted from another."""
    plain = convert.plain_matrices

    def mixed_up(matrices, begun):
        return plain(matrices, {name: torch.roll(w, 1, 0) for name, w in begun.items()})

    monkeypatch.setattr(convert, "plain_matrices", mixed_up)
    ctx = context("export", adapter=trained("pissa"))
    with pytest.raises(StepFailedError, match="is not the trained model"):
        Export().run(ExportConfig(format="adapter"), ctx)


def test_stored_factors_keep_the_difference_when_an_engine_rounds_them():
    torch.manual_seed(0)
    b0, a0 = torch.randn(64, 8), torch.randn(8, 96)
    b, a = b0 + 1e-2 * torch.randn(64, 8), a0 + 1e-2 * torch.randn(8, 96)
    exact = (b.double() @ a.double() - b0.double() @ a0.double()).float()

    def rounded(left, right):
        return left.bfloat16().float() @ right.bfloat16().float()

    ours = convert.difference(b, a, b0, a0)
    assert (ours[0] @ ours[1] - exact).norm() < 1e-5 * exact.norm()
    concatenated = rounded(torch.cat([b, -b0], 1), torch.cat([a, a0], 0))
    assert (rounded(*ours) - exact).norm() < 1e-2 * exact.norm()
    assert (concatenated - exact).norm() > 5e-2 * exact.norm()
