"""Gates: is a model good enough to go on? Pure; reports in, verdicts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from toolkit.errors import GateFailedError
from toolkit.recipe.evaluate import GateSection

LOWER_IS_BETTER = frozenset({"perplexity"})

Reports = Mapping[str, Mapping[str, float]]
"""Metrics by subject."""


@dataclass(frozen=True)
class Verdict:
    """What one bound of one gate says.

    Attributes:
        gate: Which bound, e.g. ``gptq: exact_match max_drop 0.03 against tuned``.
        passed: Whether it holds.
        message: Metric, both values, bound and row counts.
    """

    gate: str
    passed: bool
    message: str


def check(gates: Sequence[GateSection], reports: Reports, rows: Mapping[str, int]) -> list[Verdict]:
    """Check every bound of every gate.

    Args:
        gates: From the recipe.
        reports: Metrics by subject; what is missing here fails its gate, a bound is never skipped in silence.
        rows: Rows that each subject was scored on.
    """
    verdicts = []
    for gate in gates:
        if gate.min is not None:
            verdicts.append(_bound(gate, "min", gate.min, reports, rows))
        if gate.max is not None:
            verdicts.append(_bound(gate, "max", gate.max, reports, rows))
        if gate.max_drop is not None:
            verdicts.append(_drop(gate, gate.max_drop, reports, rows))
    return verdicts


def require(verdicts: Sequence[Verdict]) -> None:
    """Do nothing when all passed.

    Raises:
        GateFailedError: Lists every failure.
    """
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        lines = "".join(f"\n  {verdict.message}" for verdict in failed)
        raise GateFailedError(
            f"{len(failed)} of {len(verdicts)} gates failed:{lines}",
            "rows.jsonl of each evaluation shows every answer; bounds stand in evaluate.gates",
        )


def _bound(
    gate: GateSection, kind: str, bound: float, reports: Reports, rows: Mapping[str, int]
) -> Verdict:
    name = f"{gate.of}: {gate.metric} {kind} {_shown(bound)}"
    value = reports.get(gate.of, {}).get(gate.metric)
    if value is None:
        return _missing(name, gate.metric, gate.of, reports)
    passed = value >= bound if kind == "min" else value <= bound
    relation = {
        ("min", True): "at least",
        ("min", False): "below",
        ("max", True): "at most",
        ("max", False): "above",
    }
    return Verdict(
        name,
        passed,
        f"{gate.of}: {gate.metric} is {_shown(value)}, {relation[kind, passed]} {kind} {_shown(bound)} "
        f"({_counted(rows.get(gate.of))})",
    )


def _drop(gate: GateSection, bound: float, reports: Reports, rows: Mapping[str, int]) -> Verdict:
    name = f"{gate.of}: {gate.metric} max_drop {_shown(bound)} against {gate.against}"
    for subject in (gate.of, gate.against):
        if gate.metric not in reports.get(subject, {}):
            return _missing(name, gate.metric, subject, reports)
    value, other = reports[gate.of][gate.metric], reports[gate.against][gate.metric]
    drop = value - other if gate.metric in LOWER_IS_BETTER else other - value
    # Means of rows are fractions: 0.90 - 0.87 must keep a bound of 0.03.
    passed = drop <= bound + 1e-9
    worse = f"{_shown(drop)} worse" if drop > 0 else "no worse"
    return Verdict(
        name,
        passed,
        f"{gate.of}: {gate.metric} is {_shown(value)} ({_counted(rows.get(gate.of))}), {gate.against} has "
        f"{_shown(other)} ({_counted(rows.get(gate.against))}): {worse}, "
        f"{'within' if passed else 'more than'} max_drop {_shown(bound)}",
    )


def _missing(gate: str, metric: str, subject: str, reports: Reports) -> Verdict:
    known = ", ".join(sorted(reports.get(subject, {}))) or "nothing"
    return Verdict(
        gate, passed=False, message=f"{subject}: {metric} was not measured (measured: {known})"
    )


def _counted(rows: int | None) -> str:
    return "rows unknown" if rows is None else f"{rows} row{'' if rows == 1 else 's'}"


def _shown(value: float) -> str:
    return f"{value:.4g}"


def markdown(verdicts: Sequence[Verdict]) -> str:
    """A table for a pull request or a job summary."""
    lines = ["| gate | result | measured |", "|---|---|---|"]
    lines += [
        f"| {_cell(v.gate)} | {'passed' if v.passed else '**failed**'} | {_cell(v.message)} |"
        for v in verdicts
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def junit(verdicts: Sequence[Verdict], recipe: str) -> str:
    """JUnit XML with one test case per bound, as CI servers read it."""
    failed = sum(not verdict.passed for verdict in verdicts)
    suite = ET.Element(
        "testsuite",
        name=f"gates of {recipe}",
        tests=str(len(verdicts)),
        failures=str(failed),
        errors="0",
    )
    for verdict in verdicts:
        case = ET.SubElement(suite, "testcase", classname=f"gates.{recipe}", name=verdict.gate)
        if verdict.passed:
            ET.SubElement(case, "system-out").text = verdict.message
        else:
            ET.SubElement(
                case, "failure", message=verdict.message, type="GateFailedError"
            ).text = verdict.message
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def write(folder: Path, verdicts: Sequence[Verdict], recipe: str) -> None:
    """Write ``gates.junit.xml`` and ``gates.md``."""
    (folder / "gates.junit.xml").write_text(junit(verdicts, recipe), encoding="utf-8")
    (folder / "gates.md").write_text(markdown(verdicts), encoding="utf-8")
