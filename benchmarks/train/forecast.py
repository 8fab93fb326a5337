"""Forecast of training memory against what a GPU measures, case by case in one process.

    python benchmarks/train/forecast.py --budget 120 --out $OUT

Random weights; two optimizer steps a case by the code that training runs (``summed_loss``,
``add_adapter``, ``build_optimizer``), the second one measured. Writes ``forecast.json`` after every
case and prints a table last. ``--tiny`` runs the same on a CPU, where nothing is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from toolkit.forecast import training
from toolkit.forecast.block import Keep, Rows
from toolkit.forecast.parts import CONTEXT_BYTES, GIB
from toolkit.preflight.base_facts import BaseFacts, shape_of
from toolkit.recipe.train import LoraSection, TrainSection
from toolkit.train.batches import Batch
from toolkit.train.loss import summed_loss
from toolkit.train.model import add_adapter, trainable
from toolkit.train.optimizer import build_optimizer

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 131072,
}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    | {"tie_word_embeddings": True},
    "3B": LLAMA
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128}
    | {"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256}
    | {"tie_word_embeddings": True},
    "8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    | {"tie_word_embeddings": False},
    "qwen3-4B": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936}
    | {"tie_word_embeddings": True, "max_position_embeddings": 40960},
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}


@dataclass(frozen=True)
class Case:
    """One configuration."""

    shape: str
    method: str
    batch: int
    length: int
    keep: Keep = "nothing"
    trained: float = 1.0
    packed: bool = False
    optimizer: str = "adamw"
    rank: int = 16
    targets: tuple[str, ...] | str = "all-linear"
    fit_on: bool = False
    """Whether constants were set by this case; the others test them."""

    @property
    def label(self) -> str:
        """One line for people."""
        words = [self.shape, self.method, f"{self.batch}x{self.length}", f"keeps {self.keep}"]
        words += [f"{self.trained:.0%} trained"] if self.trained < 1 else []
        words += ["packed"] if self.packed else []
        words += [self.optimizer] if self.optimizer != "adamw" else []
        words += [f"r{self.rank}"] if self.rank != 16 else []
        words += ["q v only"] if self.targets != "all-linear" else []
        return " ".join(words)


QV = ("q_proj", "v_proj")
CASES = (
    Case("8B", "lora", 1, 4096, fit_on=True),
    Case("8B", "lora", 1, 4096, "everything", trained=0.25),
    Case("1B", "full", 4, 2048, fit_on=True),
    Case("8B", "qlora", 1, 4096),
    Case("3B", "lora", 2, 4096, "everything", fit_on=True),
    Case("1B", "lora", 8, 2048, "everything", packed=True),
    Case("8B", "lora", 4, 4096, trained=0.25, packed=True, fit_on=True),
    Case("8B", "qlora", 2, 2048, "everything", trained=0.5, optimizer="adamw_8bit"),
    Case("1B", "full", 2, 2048, "everything", optimizer="adamw_8bit"),
    Case("qwen3-4B", "lora", 2, 2048, "everything", trained=0.5),
    Case("3B", "full", 2, 2048),
    Case("8B", "lora", 1, 8192, trained=0.25, packed=True),
    Case("1B", "lora", 4, 1024, "everything", targets=QV, rank=64),
    Case("8B", "lora", 16, 1024, trained=0.1, rank=64),
    Case("qwen3-4B", "qlora", 4, 4096, trained=0.25),
    Case("3B", "qlora", 1, 8192, "everything", trained=0.1),
    Case("1B", "lora", 16, 4096, trained=0.5, packed=True),
    Case("8B", "lora", 2, 4096, "everything"),
)


def config_of(case: Case, tiny: bool) -> dict[str, Any]:
    """``config.json`` of the case's shape."""
    return SHAPES[case.shape] | (TINY if tiny else {})


def setup_of(case: Case, config: dict[str, Any], width: int) -> training.Setup:
    """What the forecast is asked."""
    shape = shape_of(BaseFacts(config))
    if shape is None:
        raise SystemExit(f"{case.shape} has no shape")
    targets = tuple(shape.linears) if case.targets == "all-linear" else tuple(case.targets)
    tokens = case.batch * case.length
    rows = Rows(case.batch, case.length, max(1, int(tokens * case.trained)), case.packed)
    base: training.Base = "nf4" if case.method == "qlora" else "bf16" if width == 2 else "fp32"
    return training.Setup(
        shape,
        case.method,
        base,
        width,
        rows,
        targets,
        case.rank,
        case.keep,
        optimizer=case.optimizer,
    )


def build(case: Case, config: dict[str, Any], device: str, section: TrainSection) -> Any:
    """The model as ``build_model`` makes it, but of random weights made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    full, width = case.method == "full", torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            made, dtype=torch.float32 if full else width, attn_implementation="sdpa"
        )
    model.config.use_cache = False
    if case.method == "qlora":
        _quantize(model, width)
    if case.keep == "nothing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not full:
        model = add_adapter(model, section.lora, "random")
    elif device == "cuda":
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    model.train()
    return model


def _quantize(model: Any, width: torch.dtype) -> None:
    """Put NF4 weights with double quantization in the place of every linear layer but the head."""
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    named = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head
    ]
    for name, layer in named:
        parent, _, last = name.rpartition(".")
        packed = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=width,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        weight = bnb.nn.Params4bit(
            layer.weight.data.cpu() if layer.weight.device.type == "cpu" else layer.weight.data,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
        )
        packed.weight = weight.to(layer.weight.device)
        setattr(model.get_submodule(parent), last, packed)
        layer.weight = None
    model.is_loaded_in_4bit = True


def batch_of(case: Case, vocabulary: int) -> Batch:
    """Random tokens; with packing, lines of three rows."""
    random = np.random.default_rng(0)
    third = case.length // 3
    ends = [third, third, case.length - 2 * third] if case.packed else [case.length]
    line = np.concatenate([np.arange(end) for end in ends])
    tokens = case.batch * case.length
    trained = max(1, int(tokens * case.trained))
    ids = random.integers(0, vocabulary, (case.batch, case.length))
    sources = np.sort(random.choice(tokens, trained, replace=False))
    targets = random.integers(0, vocabulary, trained)
    return Batch(ids, np.tile(line, (case.batch, 1)), sources, targets, tokens, (0,))


class Counters:
    """The allocator's numbers; all zero on a CPU."""

    def __init__(self, device: str) -> None:
        self.on = device == "cuda"

    def now(self) -> int:
        """Bytes allocated."""
        return torch.cuda.memory_allocated() if self.on else 0

    def peak(self) -> int:
        """Most bytes allocated since the last reset, which this is one of."""
        found = torch.cuda.max_memory_allocated() if self.on else 0
        if self.on:
            torch.cuda.reset_peak_memory_stats()
        return found

    def reserved(self) -> int:
        """Bytes that the allocator holds."""
        return torch.cuda.memory_reserved() if self.on else 0

    def used(self) -> int:
        """Bytes of the device in use, the CUDA context among them."""
        if not self.on:
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free


def run(case: Case, device: str, *, tiny: bool) -> dict[str, Any]:
    """Two steps; what was measured in the second."""
    config = config_of(case, tiny)
    lora = LoraSection(rank=case.rank, targets=case.targets)
    section = TrainSection(method=case.method, lora=lora, optimizer=case.optimizer)
    counters = Counters(device)
    model = build(case, config, device, section)
    optimizer = build_optimizer(model, section)
    batch = batch_of(case, config["vocab_size"])
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    seen: dict[str, Any] = {"weights": counters.now()}
    for _ in range(2):
        seen["held"] = counters.now()
        counters.peak()
        started = time.perf_counter()
        loss = summed_loss(model, batch) / batch.trained_tokens
        seen["kept"], seen["forward_peak"] = counters.now() - seen["held"], counters.peak()
        loss.backward()
        seen["backward_peak"] = counters.peak()
        torch.nn.utils.clip_grad_norm_([w for _, w in trainable(model)], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen["step_peak"] = counters.peak()
        del loss
        if device == "cuda":
            torch.cuda.synchronize()
        seen["seconds"] = time.perf_counter() - started
    peaks = ("forward_peak", "backward_peak", "step_peak")
    seen["allocated"] = max(seen[name] for name in peaks)
    seen["reserved"], seen["used"] = counters.reserved(), counters.used()
    return seen


def judged(case: Case, device: str, *, tiny: bool) -> dict[str, Any]:
    """A case with its forecast; out of memory is a result too."""
    setup = setup_of(case, config_of(case, tiny), 2 if device == "cuda" or tiny else 4)
    said = training.forecast(setup)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    try:
        seen: dict[str, Any] | None = run(case, device, tiny=tiny)
    except torch.OutOfMemoryError:
        seen = None
    except ImportError as error:
        print(f"{case.label}: {error}")
        seen = {"allocated": 0}
    return {
        "case": asdict(case) | {"label": case.label},
        "forecast": {
            "parts": {part.name: part.bytes for part in said.parts},
            "allocated": said.total - CONTEXT_BYTES - said.bytes_of("fragmentation"),
            "total": said.total,
            "kept": training.kept_by_all(setup),
        },
        "measured": seen,
    }


def show(results: list[dict[str, Any]]) -> None:
    """The table: forecast and measured in GiB, allocated and as the device counts."""
    print(
        f"{'case':58} {'alloc.':>7} {'seen':>7} {'error':>7} {'device':>7} {'seen':>7} {'error':>7}"
    )
    for one in results:
        said, seen = one["forecast"], one["measured"]
        line = f"{one['case']['label']:58} {said['allocated'] / GIB:7.2f}"
        if seen is None or not seen["allocated"]:
            print(line, f"{'out of memory' if seen is None else 'not measured':>15}", end="")
            print(f" {said['total'] / GIB:7.2f}")
            continue
        for name, against in (("allocated", "allocated"), ("total", "used")):
            wrong = said[name] / seen[against] - 1
            shown = f" {seen[against] / GIB:7.2f} {wrong:+7.1%}"
            line += shown if name == "allocated" else f" {said[name] / GIB:7.2f}{shown}"
        print(line, "" if one["case"]["fit_on"] else "(test)")


def main() -> None:
    """Run the cases until the budget is spent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for all cases")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, the first is 0")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [case for n, case in enumerate(CASES) if given.only is None or n in given.only]
    if given.tiny:
        chosen = [replace(case, length=case.length // 64) for case in chosen]
    started, results = time.monotonic(), []
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
    }
    for case in chosen:
        if time.monotonic() - started > given.budget:
            break
        results.append(judged(case, device, tiny=given.tiny))
        given.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"about": about, "results": results}, indent=1)
        (given.out / "forecast.json").write_text(text + "\n")
        print(f"{time.monotonic() - started:6.1f} s  {case.label}", flush=True)
    show(results)


if __name__ == "__main__":
    main()
