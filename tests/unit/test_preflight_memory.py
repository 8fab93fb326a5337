"""The memory forecast's arithmetic, and what the driver says of a GPU."""

import pytest

from tests.folders import LLAMA
from toolkit.forecast.parts import GIB
from toolkit.forecast.serving import Ask, forecast, kv_bytes_per_token, slot_bytes
from toolkit.preflight.base_facts import BaseFacts, shape_of
from toolkit.preflight.gpu import GpuFacts, described, parse

LLAMA_8B = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
BASE = BaseFacts(LLAMA_8B)
SHAPE = shape_of(BASE)


def ask(**changes):
    given = {"weight_bytes": 16 * GIB, "gpu_bytes": 80 * GIB, "fraction": 0.9, "context": 4096}
    return Ask(**{**given, "concurrent": 64, **changes})


def test_an_8b_llama_has_as_many_weights_as_its_card_says():
    assert BASE.parameters == 8_030_261_248
    assert BASE.weight_bytes == 2 * 8_030_261_248


def test_a_token_of_an_8b_llama_takes_128_kib_of_cache():
    assert kv_bytes_per_token(SHAPE) == 128 * 1024
    assert kv_bytes_per_token(SHAPE, bytes_each=1) == 64 * 1024
    assert kv_bytes_per_token(SHAPE, tensor_parallel=4) == 32 * 1024


def test_heads_are_not_cut_further_than_one_for_each_gpu():
    assert kv_bytes_per_token(SHAPE, tensor_parallel=16) == kv_bytes_per_token(
        SHAPE, tensor_parallel=8
    )


def test_a_slot_holds_the_adapter_of_every_linear_layer():
    assert (
        slot_bytes(SHAPE, 16) == 2 * 41_943_040
    )  # PEFT: 41,943,040 trainable weights for all-linear, rank 16
    assert slot_bytes(SHAPE, 32) == 2 * slot_bytes(SHAPE, 16)


def test_the_parts_add_up_to_the_budget():
    found = forecast(SHAPE, ask(slots=2, rank=16))
    assert found.budget == int(0.9 * 80 * GIB)
    assert found.fixed + found.room == found.budget
    assert found.slots == 2 * slot_bytes(SHAPE, 16)
    assert found.context == 4096 * 128 * 1024
    assert found.fits


@pytest.mark.parametrize(
    "changes",
    [{"gpu_bytes": 16 * GIB}, {"context": 600_000}, {"weight_bytes": 75 * GIB}, {"slots": 200, "rank": 256}],
)  # fmt: skip
def test_what_is_too_large_does_not_fit(changes):
    found = forecast(SHAPE, ask(**changes))
    assert not found.fits
    assert found.tokens >= 0


def test_two_gpus_hold_half_each():
    one, two = forecast(SHAPE, ask()), forecast(SHAPE, ask(tensor_parallel=2))
    assert two.weights == one.weights // 2
    assert two.room > one.room


def test_mixtures_and_latent_attention_are_not_guessed():
    assert shape_of(BaseFacts(LLAMA_8B | {"num_local_experts": 8})) is None
    assert shape_of(BaseFacts(LLAMA_8B | {"kv_lora_rank": 512})) is None
    assert BaseFacts(LLAMA_8B | {"num_local_experts": 8}).weight_bytes is None


TWO_GPUS = (
    "0, GPU-1a2b, NVIDIA H100 80GB HBM3, Disabled, 9.0, 81559, 4\n"
    "1, GPU-3c4d, NVIDIA H100 80GB HBM3, [N/A], 9.0, 81559, 40000\n"
)


def test_the_fullest_gpu_of_the_driver_speaks_for_all():
    gpu = parse(TWO_GPUS, {})
    assert gpu == GpuFacts("NVIDIA H100 80GB HBM3", 9.0, 81559 * 2**20, 40000 * 2**20, 2)


@pytest.mark.parametrize("named", ["0", "GPU-1a", " 0 ,7"])
def test_gpus_that_are_hidden_do_not_count(named):
    gpu = parse(TWO_GPUS, {"CUDA_VISIBLE_DEVICES": named})
    assert gpu == GpuFacts("NVIDIA H100 80GB HBM3", 9.0, 81559 * 2**20, 4 * 2**20, 1)


@pytest.mark.parametrize(
    ("named", "count"),
    [(None, 7), ("0", 1), ("MIG-aa,MIG-bb", 2), ("MIG-GPU-1a2b/1/0", 1), ("1", None)],
)
def test_of_a_gpu_that_is_cut_only_the_generation_is_known(named, count):
    text = "0, GPU-1a2b, NVIDIA H100, Enabled, 9.0, [Insufficient Permissions], [N/A]\n"
    gpu = parse(text, {} if named is None else {"CUDA_VISIBLE_DEVICES": named})
    assert gpu == (count and GpuFacts("NVIDIA H100", 9.0, None, count=count))


def test_where_all_gpus_are_hidden_there_is_none():
    assert parse(TWO_GPUS, {"CUDA_VISIBLE_DEVICES": ""}) is None


@pytest.mark.parametrize("text", ["", "0, GPU-1a2b, NVIDIA Thor, [N/A], [N/A], [N/A], [N/A]\n"])
def test_a_driver_that_does_not_say_leaves_it_open(text):
    assert parse(text, {}) is None


def test_a_profile_describes_the_gpus_of_another_machine():
    gpu = described(80, 9.0, 8)
    assert (gpu.memory_bytes, gpu.capability, gpu.count, gpu.used_bytes) == (80 * GIB, 9.0, 8, 0)
