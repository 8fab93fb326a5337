"""Find the settings of vLLM's LoRA kernels that are fastest on this GPU, for VLLM_TUNED_CONFIG_FOLDER.

vLLM's defaults leave much of a decode step unused: ``shrink`` splits K into 64 parts of 256 whatever K is, so that at
K=4096 three of four thread blocks multiply nothing and still add zeros atomically, and ``expand`` masks loads because
its block of 32 is larger than rank 16. The defaults are among the candidates, so a file is never slower than them in
this measurement. Weights are taken from many copies in turn, as a step meets them: not in the L2 cache.

    PYTHONPATH=~/site-vllm python3 benchmarks/serving/tune_lora.py FOLDER --budget-s 90

Writes ``GPU_SHRINK.json``, ``GPU_EXPAND_TRUE.json``, ``GPU_EXPAND_FALSE.json`` and ``tuning.json`` (microseconds).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLOTS = 8
RANK = 16
SIZES = (16, 64, 256, 2048, 8192)
"""Tokens of a step: decode, then prefill."""
COLD_BYTES = 120 * 2**20
"""Weights that one pass touches: twice the L2 cache."""
COMPILERS = 8
Config = dict[str, Any]


@dataclass(frozen=True)
class Module:
    """A linear layer as vLLM runs it; packed ones have several slices."""

    name: str
    width: int
    outputs: tuple[int, ...]


MODULES = (
    Module("qkv_proj", 4096, (4096, 1024, 1024)),
    Module("o_proj", 4096, (4096,)),
    Module("gate_up_proj", 4096, (14336, 14336)),
    Module("down_proj", 14336, (4096,)),
)


def config(m: int, n: int, k: int, *, split: int = 1, warps: int = 4, stages: int = 2) -> Config:
    """As vLLM's files name it."""
    return {
        "block_m": m, "block_n": n, "block_k": k, "split_k": split, "num_warps": warps, "num_ctas": 1,
        "group_size_m": 8, "num_stages": stages, "max_nreg": None,
    }  # fmt: skip


def shrink_candidates(module: Module, tokens: int) -> list[Config]:
    """Few tokens: split K so that all blocks are full; many tokens: larger tiles, hardly any split."""
    default = config(32, 16, 256, split=64) if tokens < 128 else config(32, 16, 32, split=8)
    if tokens < 1024:
        splits = [(block, module.width // block) for block in (128, 256, 512)]
        splits += [(block, module.width // block // 2) for block in (128, 256)]
        found = [config(m, 16, k, split=s) for m in (16, 32, 64) for k, s in splits]
    else:
        found = [
            config(m, 16, k, split=s, stages=3)
            for m in (32, 64, 128) for k in (64, 128) for s in (1, 2, 4)
        ]  # fmt: skip
    return [default, *found]


def expand_candidates(module: Module, tokens: int) -> list[Config]:
    """K is the rank: one block of it, no mask."""
    default = config(64, 64 if len(module.outputs) > 1 else 128, 32)
    blocks = (16, 32, 64) if tokens < 1024 else (32, 64, 128)
    widths = (64, 128, 256) if tokens < 1024 else (128, 256, 512)
    return [
        default,
        *(config(m, n, RANK, warps=w) for m in blocks for n in widths for w in (4, 8)),
    ]


CANDIDATES: dict[str, Callable[[Module, int], list[Config]]] = {
    "shrink": shrink_candidates,
    "expand": expand_candidates,
}


class Bench:
    """One kernel, one layer, one number of tokens: weights, inputs and the routing of tokens to adapters."""

    def __init__(self, kind: str, module: Module, tokens: int) -> None:
        import torch
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand_op, lora_shrink_op

        self.kind, self.tokens = kind, tokens
        self.ops = {"shrink": lora_shrink_op, "expand": lora_expand_op}[kind]
        sizes = [(RANK, module.width)] if kind == "shrink" else [(n, RANK) for n in module.outputs]
        sizes = sizes * len(module.outputs) if kind == "shrink" else sizes
        touched = sum(a * b for a, b in sizes) * 2
        copies = max(2, min(400, COLD_BYTES // touched)) if tokens < 1024 else 4
        device = torch.device("cuda")
        half = {"dtype": torch.bfloat16, "device": device}
        self.weights = [
            [torch.zeros(SLOTS, 1, *size, **half) for size in sizes] for _ in range(copies)
        ]
        slices = len(module.outputs)
        self.buffer = torch.zeros(slices, tokens, RANK, dtype=torch.float32, device=device)
        self.x = torch.zeros(tokens, module.width, **half)
        self.y = torch.zeros(tokens, sum(module.outputs), **half)
        each = 1 if tokens < 1024 else 128
        order = torch.arange(tokens, device=device) // each
        self.metas = []
        for adapters in (1, SLOTS):
            meta = LoRAKernelMeta.make(SLOTS, tokens, device=device)
            meta.prepare_tensors((order % adapters).to(torch.int32))
            self.metas.append(meta.meta_args(tokens, False))

    def launch(self, weights: list[Any], meta: Sequence[Any]) -> None:
        """Once."""
        if self.kind == "shrink":
            self.ops._lora_shrink(self.x, weights, self.buffer, *meta, 1.0)
        else:
            self.ops._lora_expand(
                self.buffer, weights, self.y, *meta, offset_start=0, add_inputs=True
            )

    def microseconds(self, settings: Config) -> float:
        """Of one launch, with one adapter and with eight together; infinite where the settings do not run."""
        self.ops.get_lora_op_configs = lambda *_, **__: settings
        try:
            return sum(self._timed(meta) for meta in self.metas)
        except Exception as error:  # noqa: BLE001 - a candidate may need more shared memory than there is
            print(f"{self.kind} {settings}: {error!r:.200}", file=sys.stderr)
            return float("inf")

    def _timed(self, meta: Sequence[Any]) -> float:
        import torch

        for weights in self.weights[:2]:
            self.launch(weights, meta)
        for weights in self.weights[
            2:
        ]:  # fills vLLM's table of pointers, which copies from the host
            self.launch(weights, meta)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weights in self.weights:
                self.launch(weights, meta)
        graph.replay()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(3):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) * 1000 / 3 / len(self.weights)


def cases() -> Iterator[tuple[str, Module, int]]:
    """Decode first: a budget that ends cuts prefill."""
    for tokens in sorted(SIZES, key=lambda size: (size != 64, size)):
        for kind, module in itertools.product(CANDIDATES, MODULES):
            if (kind, module.name) != ("expand", "down_proj"):  # the same as o_proj's
                yield kind, module, tokens


def compile_all(part: int) -> None:
    """Launch every ``COMPILERS``-th candidate once, which puts it into Triton's cache."""
    seen: set[str] = set()
    for kind, module, tokens in cases():
        if tokens not in (64, 2048):  # the others differ in numbers that are not compiled in
            continue
        bench = None
        for settings in CANDIDATES[kind](module, tokens):
            key = f"{kind}{len(module.outputs)}{module.width}{settings}"
            if key in seen:
                continue
            seen.add(key)
            if len(seen) % COMPILERS == part:
                bench = bench or Bench(kind, module, tokens)
                bench.ops.get_lora_op_configs = lambda *_, s=settings, **__: s
                try:
                    bench.launch(bench.weights[0], bench.metas[0])
                except Exception as error:  # noqa: BLE001 - measured, and then named
                    print(f"{kind} {settings}: {error!r:.200}", file=sys.stderr)


def tune(budget_s: float) -> list[dict[str, Any]]:
    """The best of each case, and what vLLM's own settings take."""
    begin, rows = time.monotonic(), []
    for kind, module, tokens in cases():
        if time.monotonic() - begin > budget_s:
            print(f"{kind} {module.name} {tokens}: no time left", file=sys.stderr)
            continue
        bench, found = Bench(kind, module, tokens), CANDIDATES[kind](module, tokens)
        taken = [bench.microseconds(settings) for settings in found]
        best = min(range(len(found)), key=taken.__getitem__)
        rows.append(
            {
                "kind": kind, "module": module.name, "tokens": tokens, "default_us": round(taken[0], 2),
                "best_us": round(taken[best], 2), "config": found[best],
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def files(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Layout of vLLM: slots, slices, tokens, K, N. It takes the nearest key, but must find the number of slices."""
    tables: dict[str, Any] = {"shrink": {}, "expand": {}}
    modules = {module.name: module for module in MODULES}
    for row in rows:
        module = modules[row["module"]]
        k, n = (module.width, RANK) if row["kind"] == "shrink" else (RANK, max(module.outputs))
        place = tables[row["kind"]]
        for key in (str(SLOTS + 1), str(len(module.outputs)), str(row["tokens"]), str(k)):
            place = place.setdefault(key, {})
        place[str(n)] = row["config"]
    for table in tables.values():
        for slices in table.values():
            for missing in range(1, 9):
                nearest = min(slices, key=lambda known: abs(int(known) - missing))
                slices.setdefault(str(missing), slices[nearest])
    return {
        "SHRINK": tables["shrink"],
        "EXPAND_TRUE": tables["expand"],
        "EXPAND_FALSE": tables["expand"],
    }


def main() -> None:
    """Compile in parallel, measure alone, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget-s", type=float, default=90, help="for measuring, after compiling")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile is not None:
        compile_all(options.compile)
        return
    begin = time.monotonic()
    helpers = [
        subprocess.Popen([*(sys.executable, *sys.argv), "--compile", str(part)], env=os.environ)
        for part in range(COMPILERS)
    ]
    for helper in helpers:
        helper.wait()
    compiled = time.monotonic() - begin
    import torch

    rows = tune(options.budget_s)
    gpu = torch.cuda.get_device_name().replace(" ", "_").replace("-", "_")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, table in files(rows).items():
        (options.folder / f"{gpu}_{name}.json").write_text(json.dumps(table, indent=1))
    summary = {
        "gpu": gpu,
        "compile_s": round(compiled, 1),
        "seconds": round(time.monotonic() - begin, 1),
    }
    for tokens in SIZES:
        of_size = [row for row in rows if row["tokens"] == tokens]
        summary[f"{tokens}_tokens_us"] = [
            round(sum(row[key] for row in of_size), 1) for key in ("default_us", "best_us")
        ]
    (options.folder / "tuning.json").write_text(json.dumps(summary | {"cases": rows}, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
