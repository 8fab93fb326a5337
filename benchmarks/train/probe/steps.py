"""Whole steps of the train stage's code by variant, and where the GPU's time in one goes.

The benchmark (run.py one folder up) measures the same in processes of their own; here all share
one, so that a profile and many variants fit a short call.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.train import weights
from benchmarks.train.case import hold_to_limit
from benchmarks.train.cases import AUTO, FP8, LIMIT_10, LIMIT_24, NF4, Case
from benchmarks.train.probe.book import Book, forget
from benchmarks.train.shapes import model_folder
from benchmarks.train.subjects import ours

WARM, COUNTED = 3, 5
PROFILED = ("bf16 b3", "fp8 b3", "bf16 b1 24", "fp8 b1 24")
TOP = 60
"""Kernels in a profile."""
NEEDED_S = 22
"""A variant is not begun with less left."""

VARIANTS = (
    Case("bf16 b3", "ours", AUTO, batches=(3,)),
    Case("fp8 b3", "ours", FP8, batches=(3,)),
    Case("bf16 b1 24", "ours", AUTO, batches=(1,), limit_gib=LIMIT_24),
    Case("fp8 b4", "ours", FP8, batches=(4,)),
    Case("bf16 b2", "ours", AUTO, batches=(2,)),
    Case("fp8 b1 24", "ours", FP8, batches=(1,), limit_gib=LIMIT_24),
    Case("bf16 b4", "ours", AUTO, batches=(4,)),
    Case("nf4 b1 2048 10", "ours", NF4, batches=(1,), sequence=2048, limit_gib=LIMIT_10),
    Case("nf4 b3", "ours", NF4, batches=(3,)),
    Case("bf16 b3 packed", "ours", AUTO, batches=(3,), rows="packed"),
)


def measure(book: Book, match: str, *, tiny: bool) -> None:
    """The variants whose name holds ``match``, as long as the budget lasts."""
    weights.install()
    with tempfile.TemporaryDirectory() as models:
        for variant in VARIANTS:
            if match not in variant.name or book.left() < NEEDED_S:
                continue
            case = variant.tiny() if tiny else variant
            book.take("e2e", case.name, lambda case=case: _steps(book, case, Path(models)))
            forget()


@dataclass
class Trained:
    """A model with its optimizer and rows."""

    model: Any
    optimizer: torch.optim.Optimizer
    batches: Iterator[Any]
    clip: float
    tokens: int = 0

    def step(self, *, read: bool = False) -> torch.Tensor:
        """One step; ``read`` waits for loss and norm, as the stage does when it logs each."""
        from toolkit.train.loss import summed_loss
        from toolkit.train.model import trainable

        batch = next(self.batches)
        loss = summed_loss(self.model, batch) / batch.trained_tokens
        loss.backward()
        if read:
            float(loss.detach())
        adapters = [weight for _, weight in trainable(self.model)]
        norm = torch.nn.utils.clip_grad_norm_(adapters, self.clip)
        if read:
            float(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens += batch.tokens
        return loss.detach()


def _build(case: Case, models: Path) -> Trained:
    from toolkit.train.model import build_model, numerics_for
    from toolkit.train.optimizer import build_optimizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        hold_to_limit(case)
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (batch,) = case.batches
    config, _ = ours.section(case, batch)
    folder = model_folder(case.shape, models)
    model = build_model(folder, config, numerics_for(config, device), device, {"source": "probe"})
    rows = ours.batches_of(case, batch, WARM + 2 * COUNTED + 1)
    return Trained(model, build_optimizer(model, config), rows, config.max_grad_norm)


def _steps(book: Book, case: Case, models: Path) -> dict[str, Any]:
    """Tokens per second without a wait in between, milliseconds with one, and what was kept."""
    began = time.monotonic()
    trained = _build(case, models)
    built = time.monotonic()
    losses = [float(trained.step())]
    row: dict[str, Any] = {
        "build_s": round(built - began, 1),
        "first_step_s": round(time.monotonic() - built, 1),
    }
    losses += [float(trained.step()) for _ in range(WARM - 1)]
    seconds, tokens, last = _timed(trained, read=False)
    losses.append(float(last))
    row |= {
        "tok_s": round(tokens / seconds, 1),
        "step_ms": round(seconds / COUNTED * 1e3, 2),
        "step_ms_when_read": round(_timed(trained, read=True)[0] / COUNTED * 1e3, 2),
        "losses": [round(loss, 4) for loss in losses],
        "graphs": torch._dynamo.utils.counters["stats"].get("unique_graphs"),
        "breaks": dict(torch._dynamo.utils.counters["graph_break"]),
    } | ours.path_of(trained.model)
    if torch.cuda.is_available():
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        row["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    if case.name in PROFILED:
        text = _profile(case.name, trained.step)
        (book.out / f"profile-{case.name.replace(' ', '_')}.txt").write_text(text)
        print("\n".join(line[:150] for line in text.splitlines()[:26]), flush=True)
    return row


def _timed(trained: Trained, *, read: bool) -> tuple[float, int, torch.Tensor]:
    """Seconds and tokens of the counted steps, and the last loss."""
    _wait()
    before, began = trained.tokens, time.perf_counter()
    for _ in range(COUNTED):
        last = trained.step(read=read)
    _wait()
    return time.perf_counter() - began, trained.tokens - before, last


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _profile(name: str, step: Callable[[], Any]) -> str:
    """One step's kernels by name, the dearest first, and how long the GPU was idle between them."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as taken:
        step()
        _wait()
    spent: dict[str, tuple[float, int]] = {}
    spans = []
    for event in taken.events():
        spans.append((event.time_range.start, event.time_range.end))
        ms, count = spent.get(event.name, (0.0, 0))
        took = event.device_time_total if on_gpu else event.cpu_time_total
        spent[event.name] = (ms + took / 1e3, count + 1)
    total = sum(ms for ms, _ in spent.values())
    busy, until = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    whole = until - min(spans)[0]
    idle = 100 * (1 - busy / whole)
    first = f"{name}: {total:.1f} ms of kernels; {whole / 1e3:.1f} ms from the first to the last"
    lines = [f"{first}, idle {idle:.1f} %"] + [
        f"{ms:9.2f} ms {100 * ms / total:5.1f} % {n:6d} x {ms / n * 1e3:9.1f} us  {kernel[:200]}"
        for kernel, (ms, n) in sorted(spent.items(), key=lambda item: -item[1][0])[:TOP]
    ]
    return "\n".join(lines) + "\n"
