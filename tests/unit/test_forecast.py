"""The arithmetic of the memory forecast, and the search for what fits."""

from dataclasses import replace

import pytest

from tests.folders import LLAMA
from toolkit.engines import BLOCK
from toolkit.forecast import quantizing
from toolkit.forecast.block import Rows
from toolkit.forecast.changes import least_gpu_gib, smallest
from toolkit.forecast.parts import GIB, Fit, Forecast, gib, parts, summed
from toolkit.forecast.training import Setup, forecast, kept_by_block, roomiest, weight_bytes
from toolkit.preflight.base_facts import BaseFacts, shape_of

LLAMA_8B = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
SHAPE = shape_of(BaseFacts(LLAMA_8B))


def setup(sequences=1, length=4096, trained=4096, **changes):
    given = {"method": "lora", "base": "bf16", "width": 2, "targets": BLOCK, "rank": 16}
    return Setup(SHAPE, rows=Rows(sequences, length, trained), **{**given, **changes})


def part(found, name):
    return next((p.bytes for p in found.parts if p.name == name), 0)


def test_the_parts_of_an_8b_lora_are_those_of_its_shape():
    found = forecast(setup(keep="nothing"))
    assert part(found, "weights") == 2 * 8_030_261_248
    assert part(found, "adapter") == 4 * 41_943_040
    assert part(found, "optimizer") == 8 * 41_943_040
    assert found.total == sum(p.bytes for p in found.parts)


def test_nf4_is_four_bits_and_its_scales():
    linear = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    whole = weight_bytes(setup(method="qlora", base="nf4"))
    others = 2 * (8_030_261_248 - linear)
    assert (whole - others) * 8 / linear == pytest.approx(4.127, abs=1e-3)  # the paper's number


def test_fp8_lies_twice_in_memory_or_once():
    twice, once = (weight_bytes(setup(base=base)) for base in ("fp8", "fp8_once"))
    assert twice - once == SHAPE.linear_weights


def test_full_holds_fp32_weights_gradients_and_states():
    found = forecast(setup(method="full", targets=(), rank=0, keep="nothing", trained=64))
    assert part(found, "weights") == 4 * SHAPE.weights
    assert part(found, "optimizer") == 8 * SHAPE.weights
    assert part(found, "gradients") == 4 * SHAPE.weights


def test_8_bit_states_are_a_quarter():
    whole, eight = (forecast(setup(optimizer=o)) for o in ("adamw", "adamw_8bit"))
    assert part(eight, "optimizer") == pytest.approx(part(whole, "optimizer") / 4, rel=0.02)


def test_a_block_keeps_what_its_tensors_are():
    """A Llama block under PEFT: five fp32 copies of its input, two norms, o's and down's inputs, the rest."""
    tokens, h, f, q, k = 4096, 4096, 14336, 4096, 1024
    fp32 = 4 * (5 * h + 2 * h + q + f + 7 * 16 + 2 + 32)
    bf16 = 2 * (3 * f + 2 * q + 2 * k)
    assert kept_by_block(setup()) == tokens * (fp32 + bf16)
    assert kept_by_block(setup(keep="nothing")) == tokens * 2 * h


def test_less_is_kept_by_every_policy_than_by_the_one_before():
    order = ("everything", "products", "but_mlp", "attention", "nothing")
    kept = [kept_by_block(setup(keep=keep, fused=True)) for keep in order]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)


def test_the_fast_path_keeps_as_much_as_fits():
    fast = setup(2, trained=8192, fused=True, keep="nothing")
    kept = {gpu: roomiest(fast, gpu * GIB).keep for gpu in (79, 48, 24, 10)}
    assert kept[79] == "products"
    assert kept[24] in ("attention", "nothing")
    assert kept[10] == "nothing"
    assert roomiest(setup(), 79 * GIB) == setup()
    once = setup(fused=True, keep="nothing", base="fp8_once")
    assert roomiest(once, 79 * GIB).base == "fp8"
    assert roomiest(once, 24 * GIB).base == "fp8_once"


def test_packed_rows_pay_for_their_mask():
    apart = setup()
    packed = replace(apart, rows=replace(apart.rows, apart=True))
    mask = 2 * 4096**2
    repeated = 4096 * 2 * 2 * (4096 - 1024)
    assert kept_by_block(packed) - kept_by_block(apart) == mask + repeated


@pytest.mark.parametrize(
    ("parallel", "shared"),
    [("ddp", ()), ("zero2", ("optimizer",)), ("zero3", ("optimizer", "weights")),
     ("fsdp", ("optimizer", "weights"))],
)  # fmt: skip
def test_what_is_shared_out_is_a_fourth_on_each_of_four(parallel, shared):
    one, four = forecast(setup()), forecast(setup(gpus=4, parallel=parallel))
    for name in ("optimizer", "weights"):
        ways = 4 if name in shared else 1
        assert part(four, name) == pytest.approx(part(one, name) / ways, rel=1e-6)


def test_more_of_anything_takes_no_less():
    small = forecast(setup()).total
    for larger in (
        setup(2, trained=8192),
        setup(length=8192),
        setup(rank=64),
        setup(base="fp32", width=4),
    ):
        assert forecast(larger).total > small


def test_verdicts_leave_room_for_the_error():
    total = forecast(setup(keep="nothing")).total
    fits = {
        share: forecast(setup(keep="nothing"), int(total * share)).fit for share in (1.2, 1.0, 0.8)
    }
    assert fits == {1.2: Fit.fits, 1.0: Fit.tight, 0.8: Fit.too_large}
    assert forecast(setup()).fit is Fit.unknown


def test_recomputing_is_the_first_change():
    found = smallest(setup(4, trained=4096), 79 * GIB)
    assert found.settings == {"train.gradient_checkpointing": True}
    assert found.forecast.fit is Fit.fits
    assert found.text == "train.gradient_checkpointing: true"


def test_a_smaller_batch_keeps_the_step_as_it_is():
    found = smallest(setup(64, trained=64 * 4096, keep="nothing"), 79 * GIB)
    assert found.settings == {"train.batch_size": 4, "train.gradient_accumulation": 16}


def test_a_base_that_is_too_large_is_quantized():
    found = smallest(setup(keep="nothing"), 16 * GIB)
    assert found.settings["train.method"] == "qlora"


def test_full_of_8b_becomes_an_adapter_or_is_shared_out():
    full = setup(method="full", targets=(), rank=0, keep="nothing", trained=1024)
    assert smallest(full, 79 * GIB).settings == {"train.method": "lora"}
    assert smallest(full, 79 * GIB, gpus=8).settings == {"train.parallel": "fsdp"}


def test_every_proposal_fits_and_none_is_cheaper():
    for gpu in (12, 16, 24, 40, 79):
        found = smallest(setup(16, trained=16 * 4096), gpu * GIB)
        if found:
            assert found.forecast.total * 1.05 <= gpu * GIB


def test_where_nothing_helps_the_least_gpu_is_named():
    large = setup(keep="nothing")
    assert smallest(large, 3 * GIB) is None
    assert forecast(large, least_gpu_gib(large) * GIB).fit is Fit.fits


def test_the_search_is_quick():
    import time

    started = time.process_time()
    smallest(setup(256, length=8192, trained=256 * 8192), 3 * GIB, gpus=8)
    assert time.process_time() - started < 1


def test_quantizing_holds_the_whole_model_to_measure_it():
    found = quantizing.forecast(quantizing.QuantizeSetup(SHAPE, "gptq", 4, 512))
    assert part(found, "weights") == 2 * SHAPE.weights
    assert part(found, "logits") > 8 * 512 * SHAPE.vocabulary * 2


def test_sizes_are_said_for_people():
    found = Forecast(parts(weights=16 * GIB, LoRA_slots=0, rest=GIB // 8))
    assert summed(found.parts) == "weights 16.0 + rest 0.1 = 16.1 GiB"
    assert gib(0.2 * GIB) == "0.2"
