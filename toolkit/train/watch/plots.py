"""Pictures of a run beside ``loss.png``: speed, memory, and what the GPUs did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from toolkit.train.curves import Curve, read_curve

COLOURS = ("#4c78a8", "#e45756", "#54a24b")


class Panel(NamedTuple):
    """One pair of axes: what is drawn, by metric, and how the axis is named."""

    label: str
    lines: Mapping[str, str]
    """Metric -> its name in the legend."""
    top: float | None = None
    """Where the axis ends, when it has an end."""


PICTURES: Mapping[str, Sequence[Panel]] = {
    "throughput.png": (
        Panel("tokens / s", {"tokens_per_second": "tokens / s"}),
        Panel("MFU (%)", {"mfu_percentage": "of the measured matmul peak"}),
    ),
    "memory.png": (
        Panel(
            "GPU memory (GiB)",
            {
                "gpu_memory_reserved_gib": "reserved, peak",
                "peak_gpu_memory_gib": "tensors, peak",
                "gpu_memory_gib": "tensors between steps",
            },
        ),
        Panel(
            "memory of the process (GiB)", {"peak_memory_gib": "peak", "memory_gib": "after a step"}
        ),
    ),
    "gpu.png": (
        Panel("GPU utilisation (%)", {"gpu_utilization_percentage": "utilisation"}, 105),
        Panel("power (W)", {"gpu_power_usage_watts": "power"}),
    ),
}


def draw(metrics: Path, folder: Path, title: str) -> list[Path]:
    """Draw what was logged; return the pictures. A picture without a number is not made.

    Args:
        metrics: A ``metrics.jsonl``.
        folder: Where they are written.
        title: Stands over each.
    """
    made = []
    for name, panels in PICTURES.items():
        found = [(panel, _curves(metrics, panel)) for panel in panels]
        found = [(panel, curves) for panel, curves in found if curves]
        if found:
            _picture(folder / name, title, found)
            made.append(folder / name)
    return made


def middles(values: Sequence[float], window: int) -> list[float]:
    """Median of the last ``window`` values at every place: one slow step, the first, moves no curve."""
    return [median(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def _curves(metrics: Path, panel: Panel) -> dict[str, Curve]:
    read = {key: read_curve(metrics, key) for key in panel.lines}
    return {key: curve for key, curve in read.items() if curve[0]}


def _picture(image: Path, title: str, found: Sequence[tuple[Panel, Mapping[str, Curve]]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, grid = plt.subplots(
        len(found), 1, figsize=(9, 1 + 2.5 * len(found)), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, (panel, curves) in zip(grid[:, 0], found, strict=True):
        _panel(axes, panel, curves)
    grid[0, 0].set_title(title, loc="left", fontsize=12, fontweight="bold")
    grid[-1, 0].set_xlabel("optimizer step")
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(image, dpi=120)
    plt.close(figure)


def _panel(axes: Any, panel: Panel, curves: Mapping[str, Curve]) -> None:
    for colour, (key, (steps, values)) in zip(COLOURS, curves.items(), strict=False):
        window = max(1, len(values) // 20)
        faint = len(curves) == 1 and window > 1
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, color=colour, alpha=0.35 if faint else 1, linewidth=1.2,
                  marker=marker, label=panel.lines[key])  # fmt: skip
        if faint:
            middle = middles(values, window)
            axes.plot(steps, middle, color=colour, linewidth=2, label=f"median of {window}")
    axes.set_ylabel(panel.label)
    axes.set_ylim(bottom=0, top=panel.top)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1 or len(curves) > 1:
        axes.legend(frameon=False)
