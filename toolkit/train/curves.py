"""``loss.png``: how the loss fell, and the learning rate under it."""

from __future__ import annotations

import json
from pathlib import Path

Curve = tuple[list[int], list[float]]  # steps, values


def read_curve(metrics: Path, key: str) -> Curve:
    """Steps and values of one metric of a ``metrics.jsonl``."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    points = [(line["step"], line["metrics"][key]) for line in lines if key in line["metrics"]]
    return [step for step, _ in points], [value for _, value in points]


def smoothed(values: list[float], window: int) -> list[float]:
    """Mean of the last ``window`` values at every place."""
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))
    ]


SHOWN = {
    "sft": ("loss", "loss per trained token (nats)"),
    "dpo": ("loss", "loss per pair"),
    "orpo": ("loss", "loss per pair"),
    "kto": ("loss", "loss per answer"),
    "grpo": ("reward", "mean reward of the answers"),
}
"""What is drawn for each objective, and how the axis is named."""


def draw(metrics: Path, image: Path, title: str, objective: str = "sft") -> None:
    """Draw loss (or reward), its held-out value and learning rate from ``metrics`` into ``image``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    key, label = SHOWN[objective]
    steps, losses = read_curve(metrics, key)
    heldout_steps, heldout = read_curve(metrics, f"heldout_{key}")
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    window = max(1, len(losses) // 20)
    many = window > 1
    above.plot(
        steps, losses, color="#4c78a8", alpha=0.35 if many else 1, linewidth=1.2, label="training"
    )
    if many:
        mean = smoothed(losses, window)
        above.plot(
            steps, mean, color="#4c78a8", linewidth=2, label=f"training, mean of {window} steps"
        )
    if heldout:
        above.plot(
            heldout_steps,
            heldout,
            "o-",
            color="#e45756",
            linewidth=2,
            markersize=5,
            label="held-out",
        )
    above.set_title(title, loc="left", fontsize=12, fontweight="bold")
    above.set_ylabel(label)
    if key == "loss":
        above.set_ylim(bottom=0)
    above.legend(frameon=False)
    below.plot(*read_curve(metrics, "learning_rate"), color="#54a24b", linewidth=1.5)
    below.set_ylabel("learning rate")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.set_xlabel("optimizer step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(image, dpi=120)
    plt.close(figure)
