"""What training says of a GPU: the measured peak, MFU, memory, utilisation, power, energy, kernels in a profile.

Run there with ``python3 -m pytest -m gpu -s tests/gpu/test_watch_on_gpu.py``: 8 layers of Llama-3.1-8B's shape with
random weights, a minute and a half. Needs torch, transformers, peft and matplotlib of the host, and the toolkit's core.
"""

import gzip
import json
import shutil
import time

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU on this machine"),
]

LENGTH, BATCH, STEPS = 4096, 2, 40
CONFIG = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base of random weights with a tokenizer, and full rows."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from toolkit.data.store import TokenRow, TokenStore
    from toolkit.stages import Input, Kind

    base, rows = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("rows")
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG))
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(base)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(500)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(base)
    del model
    torch.cuda.empty_cache()
    random = np.random.default_rng(1)
    for side, count in (("train", STEPS * BATCH), ("heldout", 2)):
        made = [
            TokenRow(random.integers(3, 500, LENGTH).astype(np.int32), np.ones(LENGTH, bool))
            for _ in range(count)
        ]
        TokenStore.write(rows / "tokens" / side, made)
    return {
        "model": Input(base, Kind.model, "b" * 64, {"source": "tests/eight-layers"}),
        "dataset": Input(rows, Kind.dataset, "d" * 64, {}),
    }


def logged(folder, key):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"][key] for line in lines if key in line["metrics"]]


@pytest.mark.parametrize("base_precision", ["auto", "fp8"])
def test_a_run_says_what_it_makes_of_the_gpu(inputs, tmp_path, monkeypatch, base_precision):
    import torch

    from toolkit.recipe.train import TrainSection
    from toolkit.stages import StageContext
    from toolkit.stages.train import Train, TrainConfig

    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    for name in ("output", "state"):
        (tmp_path / name).mkdir()
    events = (tmp_path / "events").open("w")
    ctx = StageContext(
        inputs, tmp_path / "output", tmp_path / "state", tmp_path, device="cuda", events=events,
        profile_steps=(10, 11),
    )  # fmt: skip
    section = TrainSection(
        max_steps=STEPS, batch_size=BATCH, packing=False, base_precision=base_precision,
        checkpoint_every=None,
    )  # fmt: skip
    began = time.monotonic()
    config = TrainConfig(train=section, max_length=LENGTH, seed=1)
    found = Train().run(config, ctx).metrics
    events.close()
    lines = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    print(f"\n{base_precision}: {time.monotonic() - began:.0f} s")
    print([line["text"] for line in lines if "matrix products" in line.get("text", "")])
    print([line for line in lines if line["event"] == "progress"][-1]["shown"])
    print({k: v for k, v in found.items() if "gpu" in k or "mfu" in k or "kwh" in k})
    assert 10 < found["mfu_percentage"] < 100
    assert 20 < found["gpu_utilization_percentage"] <= 100
    assert 100 < found["gpu_power_usage_watts"] < 1500
    assert found["energy_kwh"] * 3.6e6 == pytest.approx(
        found["gpu_power_usage_watts"] * sum(logged(ctx.output, "step_s")), rel=0.5
    )
    peak = torch.cuda.max_memory_allocated() / 2**30
    assert logged(ctx.output, "peak_gpu_memory_gib")[-1] == pytest.approx(peak, rel=0.05)
    assert logged(ctx.output, "gpu_memory_gib")[-1] < logged(ctx.output, "peak_gpu_memory_gib")[-1]
    kept = sorted(path.name for path in (tmp_path / "cache" / "matmul-peaks").iterdir())
    assert len(kept) == (2 if base_precision == "fp8" else 1)
    for name in ("throughput.png", "memory.png", "gpu.png"):
        assert (ctx.output / name).is_file()
    folder = ctx.output / "profile"
    trace = json.loads(gzip.decompress((folder / "steps-10-11.json.gz").read_bytes()))
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    table = (folder / "steps-10-11.txt").read_text()
    assert "Self CUDA" in table
    print(table[:3000])


def test_the_peak_is_measured_in_a_fraction_of_a_second():
    from toolkit.train.watch import peak

    peak.measured("bf16")  # libraries are loaded
    for each in ("bf16", "fp8"):
        began = time.monotonic()
        found = peak.measured(each)
        print(f"\n{each}: {found / 1e12:.1f} TFLOP/s in {time.monotonic() - began:.2f} s")
        assert time.monotonic() - began < 2
        assert found > 5e13
