"""What a quantization leaves for people: ``report.json`` and ``report.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.evaluation.report import fence
from toolkit.quantizers.probe import Behaviour


def numbers(full: Behaviour, quantized: Behaviour, seconds: float) -> dict[str, float]:
    """Flat metrics of the step."""
    found = {"size_mb": quantized.size_mb, "size_mb_full": full.size_mb, "seconds": seconds}
    if quantized.perplexity is not None and full.perplexity is not None:
        found |= {"perplexity": quantized.perplexity, "perplexity_full": full.perplexity}
    return found


def write(
    folder: Path,
    manifest: Mapping[str, Any],
    questions: Sequence[Mapping[str, Any]],
    *,
    full: Behaviour,
    quantized: Behaviour,
    seconds: float,
) -> None:
    """Write both files."""
    pairs = list(zip(questions, full.answers, quantized.answers, strict=True))
    data = {
        **numbers(full, quantized, seconds),
        "generations": [
            {"messages": q["messages"], "full": a, "quantized": b} for q, a, b in pairs
        ],
    }
    (folder / "report.json").write_text(
        json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "report.md").write_text(
        markdown(manifest, pairs, full, quantized, seconds), encoding="utf-8"
    )


def markdown(
    manifest: Mapping[str, Any],
    pairs: Sequence[tuple[Mapping[str, Any], str, str]],
    full: Behaviour,
    quantized: Behaviour,
    seconds: float,
) -> str:
    """Sizes, perplexities and answers side by side."""
    group = manifest.get("group_size")
    lines = [
        f"# {manifest['method']}, {manifest['bits']} bits"
        + (f", groups of {group}" if group else ""),
        "",
        f"Quantized in {seconds:.0f} s, calibrated on {manifest['calibration']['rows']} rows.",
        "",
        "| | full | quantized |",
        "|---|---|---|",
        f"| weights, MB | {full.size_mb:.1f} | {quantized.size_mb:.1f} |",
    ]
    if full.perplexity is not None and quantized.perplexity is not None:
        lines.append(
            f"| perplexity on held-out rows | {full.perplexity:.3f} | {quantized.perplexity:.3f} |"
        )
    for question, ours, theirs in pairs:
        lines += ["", f"## {question['messages'][-1]['content'].splitlines()[0][:100]}"]
        lines += _answer("full", ours) + _answer("quantized", theirs)
    return "\n".join(lines) + "\n"


def _answer(who: str, text: str) -> list[str]:
    mark = fence(text)
    return ["", f"{who}:", mark, text, mark]
