"""Trains a random Llama with each engine and prints one JSON line per case; started by torchrun, or alone.

    python3 tests/gpu/ranks_on_gpu.py OUT.json single
    python3 -m torch.distributed.run --standalone --nproc-per-node 2 tests/gpu/ranks_on_gpu.py OUT.json ddp fsdp

The model has the width of Llama-3.1-8B and a quarter of its layers, made on the GPU from one seed: nothing is read.
``RANKS_LAYERS``, ``RANKS_STEPS``, ``RANKS_BATCH`` and ``RANKS_TINY=1`` (any device) change that, ``RANKS_PASSES`` is
how many micro-batches a step has over all ranks.
"""

import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from toolkit.data.store import TokenRow, TokenStore
from toolkit.recipe.train import TrainSection
from toolkit.stages import Input, Kind, StageContext
from toolkit.train import model as building
from toolkit.train.parallel.ranks import Ranks
from toolkit.train.sft import fine_tune

TINY = os.environ.get("RANKS_TINY") == "1"
LAYERS = int(os.environ.get("RANKS_LAYERS", "2" if TINY else "8"))
STEPS = int(os.environ.get("RANKS_STEPS", "8"))
BATCH = int(os.environ.get("RANKS_BATCH", "2"))
PASSES = int(os.environ.get("RANKS_PASSES", "4"))
LENGTH = 64 if TINY else 4096
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP = 3  # steps that are not timed

SHAPE = {
    "vocab_size": 512 if TINY else 128_256,
    "hidden_size": 64 if TINY else 4096,
    "intermediate_size": 128 if TINY else 14_336,
    "num_attention_heads": 4 if TINY else 32,
    "num_key_value_heads": 2 if TINY else 8,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}
CASES = {
    "single": {},
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "zero2": {"parallel": "zero2"},
    "zero3": {"parallel": "zero3"},
    "full-single": {"method": "full", "learning_rate": 1e-5},
    "full-fsdp": {"method": "full", "parallel": "fsdp", "learning_rate": 1e-5},
    "full-zero3": {"method": "full", "parallel": "zero3", "learning_rate": 1e-5},
}


def random_base(folder, numerics, device, **_):
    """What ``load_base`` gives, from a seed instead of files; the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(building.torch_dtype(numerics.precision))
    try:
        with torch.device(device if device == "cpu" else f"cuda:{torch.cuda.current_device()}"):
            return LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa"))
    finally:
        torch.set_default_dtype(kept)


def inputs(folder: Path) -> dict[str, Input]:
    """Rows of full length that count on: a loss that falls, and no padding."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(STEPS * PASSES * BATCH):
        ids = int(random.integers(0, 100)) + int(random.integers(1, 4)) * np.arange(LENGTH)
        rows.append(TokenRow((ids % 500).astype(np.int32), np.arange(LENGTH) > 3))
    TokenStore.write(folder / "data" / "tokens" / "train", rows)
    TokenStore.write(folder / "data" / "tokens" / "heldout", rows[:2])
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    return {
        "model": Input(folder / "base", Kind.model, "b" * 64, {"source": "tests/random"}),
        "dataset": Input(folder / "data", Kind.dataset, "d" * 64, {}),
    }


def case(name: str, ranks: Ranks, root: Path) -> dict:
    """One run; its curve, speed and memory."""
    folder = root / f"{name}-{ranks.rank}"
    for part in ("output", "state"):
        (folder / part).mkdir(parents=True)
    ctx = StageContext(inputs(folder), folder / "output", folder / "state", folder, DEVICE)
    values = {
        "lora": {"rank": 16},
        "batch_size": BATCH,
        "gradient_accumulation": PASSES // ranks.count,
        "max_steps": STEPS,
        "learning_rate": 2e-3,
        "checkpoint_every": None,
        "packing": False,
    }
    config = TrainSection(**(values | CASES[name]))
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    numerics = building.numerics_for(config, DEVICE)
    started = time.perf_counter()
    outcome = fine_tune(config, LENGTH, 0, numerics, ranks=ranks, ctx=ctx)
    seconds = time.perf_counter() - started
    lines = [json.loads(line) for line in (ctx.output / "metrics.jsonl").read_text().splitlines()]
    steps = [line["metrics"] for line in lines if "loss" in line["metrics"]]
    speeds = sorted(step["tokens_per_second"] for step in steps[WARM_UP:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
    return {
        "case": name,
        "engine": outcome.engine.name,
        "ranks": ranks.count,
        "loss": [step["loss"] for step in steps],
        "grad_norm": [step["grad_norm"] for step in steps],
        "heldout_loss": outcome.heldout_loss,
        "tokens_per_second": speeds[len(speeds) // 2],
        "peak_gib": round(peak, 2),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def main() -> None:
    out, *names = sys.argv[1:]
    building.load_base = random_base
    with Ranks.here(DEVICE) as ranks, tempfile.TemporaryDirectory() as root:
        for name in names:
            found = case(name, ranks, Path(root))
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
            if ranks.first:
                print(json.dumps(found), flush=True)
                with Path(out).open("a") as file:
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
