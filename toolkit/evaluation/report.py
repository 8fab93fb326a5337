"""What an evaluation leaves for people and programs: ``rows.jsonl``, ``report.json``, ``report.md``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.evaluation.interval import Estimate

EXAMPLES = 5


@dataclass(frozen=True)
class Report:
    """Scores of one model.

    Attributes:
        subject: The model's name in the recipe.
        through: ``transformers`` or ``engine``.
        rows: Rows with an answer to generate.
        skipped: Rows without one (plain text, or no assistant turn at the end).
        estimates: By metric.
        examples: Results that did worst, for a first look.
    """

    subject: str
    through: str
    rows: int
    skipped: int
    estimates: Mapping[str, Estimate]
    examples: Sequence[Mapping[str, Any]]

    def metrics(self) -> dict[str, float]:
        """Flat numbers for the manifest, MLflow and gates."""
        return {name: estimate.value for name, estimate in self.estimates.items()} | {
            "rows": float(self.rows)
        }

    def write(self, folder: Path) -> None:
        """Write ``report.json`` and ``report.md``."""
        data = {
            "subject": self.subject,
            "through": self.through,
            "rows": self.rows,
            "skipped": self.skipped,
            "metrics": {
                n: {"value": e.value, "ci95": [e.low, e.high]} for n, e in self.estimates.items()
            },
        }
        (folder / "report.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """The table of metrics with 95 % intervals, and examples."""
        lines = [f"# {self.subject}", "", f"{self.rows} held-out rows, through {self.through}.", ""]
        if self.skipped:
            lines += [f"{self.skipped} rows have no answer to compare with and were skipped.", ""]
        lines += ["| metric | mean | 95 % interval |", "|---|---|---|"]
        lines += [
            f"| {n} | {e.value:.4f} | {e.low:.4f} to {e.high:.4f} |"
            for n, e in self.estimates.items()
        ]
        if self.examples:
            lines += ["", "## Lowest scores"]
        for row in self.examples:
            lines += [
                "",
                f"### {row['id']}",
                *_fenced("wanted", row["reference"]),
                *_fenced("got", row["prediction"]),
            ]
        return "\n".join(lines) + "\n"


def worst(results: Iterable[Mapping[str, Any]], count: int = EXAMPLES) -> list[Mapping[str, Any]]:
    """Results with the lowest mean score, in a stable order; perfect ones are left out."""

    def mean(row: Mapping[str, Any]) -> float:
        return float(sum(row["scores"].values()) / len(row["scores"]))

    flawed = [row for row in results if row["scores"] and mean(row) < 1]
    return sorted(flawed, key=lambda row: (mean(row), row["id"]))[:count]


def write_rows(file: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """One line per row: id, prompt, prediction, reference, scores."""
    with file.open("w", encoding="utf-8") as lines:
        for row in results:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def fence(text: str) -> str:
    """A run of backticks longer than any in the text."""
    longest = max((len(run) for run in _runs(text)), default=0)
    return "`" * max(3, longest + 1)


def _runs(text: str) -> list[str]:
    import re

    return re.findall(r"`+", text)


def _fenced(title: str, text: str) -> list[str]:
    mark = fence(text)
    return ["", f"{title}:", mark, text, mark]
