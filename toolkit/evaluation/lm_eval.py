"""Tasks of lm-evaluation-harness, asked of a server: a program of its own, started in this environment."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import NotInstalledError, StepFailedError
from toolkit.recipe.evaluate import LmEvalSection

LOG_TAIL = 2000


def command(
    section: LmEvalSection, url: str, model: str, *, tokenizer: Path, output: Path, concurrent: int
) -> list[str]:
    """Arguments of the run. Completions, not chat: many tasks compare likelihoods of the prompt."""
    arguments = {
        "model": model,
        "base_url": url.rstrip("/").removesuffix("/v1") + "/v1/completions",
        "tokenizer": str(tokenizer),
        "num_concurrent": str(concurrent),
        "tokenized_requests": "False",
    }
    limit = () if section.limit is None else ("--limit", str(section.limit))
    return [
        sys.executable, "-m", "lm_eval", "--model", "local-completions",
        "--model_args", ",".join(f"{key}={value}" for key, value in arguments.items()),
        "--tasks", ",".join(section.tasks), *limit, "--output_path", str(output),
    ]  # fmt: skip


def run(
    section: LmEvalSection, url: str, model: str, *, tokenizer: Path, output: Path, concurrent: int
) -> dict[str, float]:
    """Run the tasks; return ``{"<task>.<metric>": value}``.

    Raises:
        NotInstalledError: lm-eval is not in this environment.
        StepFailedError: It failed; the message holds the end of what it said.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise NotInstalledError(
            f"evaluate.lm_eval asks for {', '.join(section.tasks)}, but lm-eval is not installed in {sys.prefix}",
            "add lm-eval[api] to the quantize environment, or remove evaluate.lm_eval from the recipe",
        )
    output.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command(section, url, model, tokenizer=tokenizer, output=output, concurrent=concurrent),
        env=os.environ | {"OPENAI_API_KEY": "none"},  # the harness wants one, the local server does not
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    (output / "lm_eval.log").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise StepFailedError(f"lm_eval exited with {done.returncode}:\n{done.stdout[-LOG_TAIL:]}")
    newest = max(output.rglob("results*.json"), key=lambda file: file.stat().st_mtime, default=None)
    if newest is None:
        raise StepFailedError(
            f"lm_eval wrote no results below {output}:\n{done.stdout[-LOG_TAIL:]}"
        )
    return flatten(json.loads(newest.read_text(encoding="utf-8"))["results"])


def flatten(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """``{"arc": {"acc,none": 0.5, "acc_stderr,none": 0.1}}`` becomes ``{"arc.acc": 0.5}``."""
    return {
        f"{task}.{metric.split(',')[0]}": float(value)
        for task, values in results.items()
        for metric, value in values.items()
        if isinstance(value, int | float) and "_stderr" not in metric and metric != "sample_len"
    }
