"""The results file: written the moment a case ends, so that a call that is cut off loses one at most."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.results import describe_machine, said
from benchmarks.train.cases import Case

SCHEMA = 1


class Results:
    """Cases by name and batch (``ours-auto-bf16/b3``) in one JSON file.

    Args:
        file: Read if it is there; what is in it and did not fail is not measured again.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Any] = {"schema": SCHEMA, "machines": {}, "cases": {}}
        if file.exists():
            self.values = json.loads(file.read_text())
        machine = describe_machine()
        self._machine = next(
            (key for key, known in self.values["machines"].items() if known == machine),
            f"machine-{len(self.values['machines']) + 1}",
        )
        self.values["machines"][self._machine] = machine

    def get(self, name: str) -> dict[str, Any] | None:
        """What was measured; ``None`` when it was not, or failed."""
        found: dict[str, Any] | None = self.values["cases"].get(name)
        return None if found is None or "error" in found else found

    def add(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep a case."""
        at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self.values["cases"][name] = {"at": at, "machine": self._machine, **value}
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.values, indent=1))
        part.replace(self.file)

    def forget(self, case: str) -> None:
        """Drop a case, at every batch."""
        kept = {k: v for k, v in self.values["cases"].items() if not k.startswith(f"{case}/")}
        self.values["cases"] = kept

    def state(self, case: Case) -> str:
        """What is there of a case, in a few words."""
        found = {b: self.values["cases"].get(f"{case.name}/b{b}") for b in case.batches}
        parts = [f"b{b}: {_word(value)}" for b, value in found.items() if value]
        return "; ".join(parts) or f"missing, some {case.expected_s} s"

    def short_table(self, cases: Sequence[Case]) -> str:
        """One line per case, for the end of a log."""
        return "\n".join(f"{case.name:24} {self.state(case)}" for case in cases)


def _word(value: Mapping[str, Any]) -> str:
    for key in ("error", "out_of_memory"):
        if key in value:
            return key.replace("_", " ")
    if "bf16_matmul_tflops" in value:
        return f"{value['bf16_matmul_tflops']} TFLOP/s"
    return (
        f"{value.get('tokens_per_s', 0):,.0f} tok/s, peak {value.get('peak_allocated_gib', 0)} / "
        f"{value.get('peak_reserved_gib', 0)} GiB, first step {value.get('seconds_to_first_step')} s"
    )


def compute_capability() -> tuple[int, int] | None:
    """Of the first GPU, without opening it."""
    answer = said("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    if not answer:
        return None
    major, _, minor = answer.splitlines()[0].strip().partition(".")
    return int(major), int(minor)
