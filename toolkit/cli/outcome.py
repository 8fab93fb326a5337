"""How a run of steps went: for people, and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.cli import render

if TYPE_CHECKING:
    from toolkit.execute import RunOutcome
    from toolkit.prepare import Prepared


def summary(outcome: RunOutcome) -> dict[str, Any]:
    """The outcome as JSON."""
    return {
        "mlflow_run": outcome.parent_run,
        "steps": [
            {
                "name": s.step.name,
                "cached": s.cached,
                "seconds": s.artifact.manifest["seconds"],
                "peak_memory_gib": s.artifact.manifest["peak_memory_gib"],
                "metrics": s.artifact.metrics,
                "artifact": str(s.artifact.path),
                "mlflow_run": (s.artifact.manifest["mlflow"] or {}).get("run_id"),
            }
            for s in outcome.steps
        ],
        "gates": [{"passed": v.passed, "message": v.message} for v in outcome.verdicts],
        "choice": next(
            (s.artifact.manifest["facts"] for s in outcome.steps if s.step.stage == "choose"), None
        ),
    }


def report(outcome: RunOutcome, prepared: Prepared, *, as_json: bool) -> None:
    """Say how it went, for people or as JSON."""
    if as_json:
        render.as_json(summary(outcome))
    else:
        show(outcome, prepared)


def show(outcome: RunOutcome, prepared: Prepared) -> None:
    """A line for each step, then gates, answers, and what to do next."""
    rows = []
    for s in outcome.steps:
        manifest = s.artifact.manifest
        run_id = (manifest["mlflow"] or {}).get("run_id") or ""
        rows.append(
            (
                s.step.name,
                "done before" if s.cached else render.duration(manifest["seconds"]),
                f"{manifest['peak_memory_gib']:.2f}",
                _headline(s.artifact.metrics, prepared),
                _relative(s.artifact.path),
                run_id[:8],
            )
        )
    render.table(("step", "time", "peak GiB", "result", "artifact", "MLflow run"), rows)
    for verdict in outcome.verdicts:
        render.say(f"gate {'passed' if verdict.passed else 'FAILED'}: {verdict.message}")
    _show_answers(outcome)
    _show_choice(outcome)
    if outcome.parent_run is None:
        render.say("everything is done: nothing had to run")
    if prepared.loaded.recipe.serve:
        render.say(f"serve it:          toolkit serve {prepared.loaded.path}")
    render.say(f"look at the runs:  toolkit ui --workspace {_relative(prepared.workspace.root)}")


def _show_answers(outcome: RunOutcome) -> None:
    """What the served models said to the first question of each."""
    import json

    for s in outcome.steps:
        file = s.artifact.path / "answers.json"
        if s.step.stage == "serve" and file.exists():
            answers = json.loads(file.read_text())
            render.say(f"{s.step.name} was asked: {answers[0]['question']}")
            for model in dict.fromkeys(a["model"] for a in answers):
                said = next(a["answer"] for a in answers if a["model"] == model)
                render.say(f"  {model} said: {_one_line(said)}")


def _show_choice(outcome: RunOutcome) -> None:
    """Which of two ways to serve the tuned model `toolkit serve` takes, with the numbers."""
    for s in outcome.steps:
        if s.step.stage == "choose":
            chosen = s.artifact.manifest["facts"]
            render.say(f"`toolkit serve` takes {chosen['subject']}: {chosen['why']}")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:117]}..."


HEADLINES = (
    "heldout_loss",
    "final_loss",
    "perplexity",
    "size_mb",
    "tokens_per_second",
    "start_seconds",
    "rows",
)
"""Metrics worth a place in the closing table, besides those that the recipe evaluates."""


def _headline(metrics: dict[str, float], prepared: Prepared) -> str:
    section = prepared.loaded.recipe.evaluate
    wanted = (*(section.metrics if section else ()), *HEADLINES)
    shown = [name for name in wanted if name in metrics][:2]
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in shown)


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
