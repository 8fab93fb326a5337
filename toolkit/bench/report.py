"""From samples to numbers, a table and a plot."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.bench.load import Level
from toolkit.errors import NotInstalledError

PERCENTILES = (50, 90, 95, 99)


def percentile(values: Sequence[float], p: float) -> float:
    """Linear interpolation between closest ranks (numpy's default), ``0 <= p <= 100``.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * p / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds; ``None`` without values."""
    if not values:
        return None
    named = {f"p{p}": percentile(values, p) for p in PERCENTILES}
    mean = sum(values) / len(values)
    return {key: round(value * 1000, 3) for key, value in {"mean": mean, **named}.items()}


def summarize(level: Level) -> dict[str, Any]:
    """Numbers of one level. Failed requests are counted and named, and are in no time or throughput."""
    good = [sample for sample in level.samples if sample.error is None]
    tokens = sum(sample.completion_tokens for sample in good)
    return {
        "concurrency": level.concurrency,
        "requests": len(level.samples),
        "errors": len(level.samples) - len(good),
        "error_messages": dict(collections.Counter(s.error for s in level.samples if s.error)),
        "seconds": round(level.seconds, 3),
        "prompt_tokens": sum(sample.prompt_tokens for sample in good),
        "completion_tokens": tokens,
        "requests_per_second": round(len(good) / level.seconds, 3),
        "output_tokens_per_second": round(tokens / level.seconds, 2),
        "ttft_ms": spread([sample.ttft for sample in good]),
        "tpot_ms": spread([sample.tpot for sample in good if sample.tpot is not None]),
        "itl_ms": spread([gap for sample in good for gap in sample.gaps]),
        "e2e_ms": spread([sample.e2e for sample in good]),
    }


COLUMNS = (
    "clients", "requests", "errors", "tok/s", "req/s", "ttft p50 ms", "ttft p99", "tpot p50", "tpot p99",
    "itl p99", "e2e p50", "e2e p99",
)  # fmt: skip


def row(summary: dict[str, Any]) -> tuple[Any, ...]:
    """One line of the table."""

    def at(metric: str, point: str) -> float | None:
        values = summary[metric]
        return None if values is None else round(values[point], 1)

    return (
        summary["concurrency"], summary["requests"], summary["errors"],
        summary["output_tokens_per_second"], summary["requests_per_second"],
        at("ttft_ms", "p50"), at("ttft_ms", "p99"), at("tpot_ms", "p50"), at("tpot_ms", "p99"),
        at("itl_ms", "p99"), at("e2e_ms", "p50"), at("e2e_ms", "p99"),
    )  # fmt: skip


def plot(summaries: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Draw throughput and latency over concurrency into a PNG.

    Raises:
        NotInstalledError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise NotInstalledError(
            "matplotlib is not installed, so there is no plot; the JSON has every number",
            "pip install 'toolkit[ui]'",
        ) from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [summary for summary in summaries if summary["ttft_ms"]]
    clients = [summary["concurrency"] for summary in shown]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    axes[0].plot(clients, [s["output_tokens_per_second"] for s in shown], marker="o")
    axes[0].set_ylabel("output tokens per second")
    for axis, metric, label in (
        (axes[1], "ttft_ms", "time to first token, ms"),
        (axes[2], "tpot_ms", "time per output token, ms"),
    ):
        for point in ("p50", "p99"):
            pairs = [(s["concurrency"], s[metric][point]) for s in shown if s[metric]]
            axis.plot(*zip(*pairs, strict=True), marker="o", label=point) if pairs else None
        axis.set_ylabel(label)
        axis.legend()
    for axis in axes:
        axis.set_xlabel("concurrent clients")
        axis.set_xticks(clients)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    plt.close(figure)
