"""``quantize``: a smaller copy of a model that an engine loads natively."""

from __future__ import annotations

import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from toolkit.errors import PreflightError
from toolkit.quantizers import QUANTIZERS, Job, Quantized, calibration
from toolkit.recipe.base import Section
from toolkit.recipe.quantize import QuantizeSection
from toolkit.stages import Input, Kind, StageContext, StageResult

HELDOUT_ROWS = 48
QUESTIONS = 4


class QuantizeConfig(Section):
    """What decides the quantized bytes."""

    quantize: QuantizeSection
    max_length: int
    seed: int


class Quantize:
    """Inputs ``model`` and, when the recipe has data, ``dataset``.

    Writes a model folder, ``quantization.json`` and ``reference.json``.
    """

    name: ClassVar[str] = "quantize"
    produces: ClassVar[Kind] = Kind.model
    revision: ClassVar[int] = 3
    environment: ClassVar[str] = "quantize"

    def run(self, config: QuantizeConfig, ctx: StageContext) -> StageResult:
        """Calibrate, quantize, save, report.

        Raises:
            PreflightError: The model is quantized already, or the group size does not divide its shapes.
        """
        _be_quiet()
        from toolkit.evaluation.loading import release
        from toolkit.models.folder import copy_companions
        from toolkit.proof.recorder import Recorder
        from toolkit.quantizers import probe, report

        model = ctx.inputs["model"]
        source, trust = model.path, model.trusts_code
        _require_full(source)
        rows = _Rows.read(config, model, ctx.inputs.get("dataset"))
        ctx.note("measuring the full model")
        dataset = ctx.inputs.get("dataset")
        recorder = Recorder(source, dataset.path if dataset else None, trust_remote_code=trust)
        full = probe.measure(
            source,
            rows.probe,
            ctx.device,
            ctx.progress,
            trust_remote_code=trust,
            also=lambda model: recorder.score("beside", model),
        )

        quantizer = QUANTIZERS[config.quantize.method]()
        token_rows = rows.calibration if quantizer.calibrates else []
        ctx.note(
            f"quantizing with {config.quantize.method}"
            + (f" on {len(token_rows)} rows" if token_rows else "")
        )
        start = time.monotonic()
        batches = calibration.batches(token_rows)
        quantized = quantizer.quantize(
            Job(source, config.quantize, ctx.device, batches, ctx.progress, trust)
        )
        quantized.model.save_pretrained(ctx.output)
        copy_companions(source, ctx.output)
        seconds = time.monotonic() - start
        manifest = _manifest(
            config, quantized, token_rows, rows.mix, (full.size_mb, probe.weights_mb(ctx.output))
        )
        del quantized, batches
        release(ctx.device)

        ctx.note("measuring the quantized model")
        after = probe.measure(
            ctx.output,
            rows.probe,
            ctx.device,
            ctx.progress,
            trust_remote_code=trust,
            also=lambda model: recorder.score("model", model),
        )
        recorder.write(
            ctx.output,
            "model",
            precision="fp32" if ctx.device == "cpu" else "bf16",
            made_from=source,
        )
        (ctx.output / "quantization.json").write_text(json.dumps(manifest, indent=2) + "\n")
        report.write(
            ctx.output, manifest, rows.probe.questions, full=full, quantized=after, seconds=seconds
        )
        facts = {"quantization": manifest, "trust_remote_code": trust}
        return StageResult(report.numbers(full, after, seconds), facts)


class _Rows:
    """Rows by their use: calibration, held-out perplexity, questions."""

    def __init__(self, mix: calibration.Mix, token_rows: list[list[int]], probe: Any) -> None:
        self.mix, self.calibration, self.probe = mix, token_rows, probe

    @classmethod
    def read(cls, config: QuantizeConfig, model: Input, dataset: Input | None) -> _Rows:
        from toolkit.data.store import TokenStore
        from toolkit.evaluation.loading import load_tokenizer

        tokenizer = load_tokenizer(model.path, trust_remote_code=model.trusts_code)
        general = calibration.general_text()
        store = TokenStore(dataset.path / "tokens" / "train") if dataset else None
        mix = calibration.mix(
            len(store) if store else 0, len(general), config.quantize.calibration, config.seed
        )
        token_rows = calibration.token_rows(mix, store, general, tokenizer, config.max_length)
        left = [general[index] for index in mix.general_left]
        probe = (
            _dataset_probe(dataset.path)
            if dataset
            else _general_probe(left, tokenizer, config.max_length)
        )
        return cls(mix, token_rows, probe)


def _dataset_probe(dataset: Path) -> Any:
    from toolkit.data.store import TokenStore
    from toolkit.evaluation.rows import choose, read_rows
    from toolkit.quantizers.probe import Probe

    rows = choose(read_rows(dataset / "heldout.jsonl"), HELDOUT_ROWS)
    store = TokenStore(dataset / "tokens" / "heldout")
    asked = [row for row in rows if row.reference is not None][:QUESTIONS]
    questions = [{"messages": list(row.prompt), "tools": row.tools} for row in asked]
    return Probe([store[row.index] for row in rows], questions)


def _general_probe(left: list[dict[str, Any]], tokenizer: Any, max_length: int) -> Any:
    import numpy as np

    from toolkit.data.store import TokenRow
    from toolkit.quantizers.probe import Probe

    ids = [
        np.array(calibration.tokenize(row, tokenizer)[:max_length], np.int32)
        for row in left[:HELDOUT_ROWS]
    ]
    questions = [{"messages": row["messages"][:-1]} for row in left if "messages" in row][
        :QUESTIONS
    ]
    return Probe([TokenRow(row, np.ones(len(row), bool)) for row in ids], questions)


def _require_full(source: Path) -> None:
    from toolkit.evaluation.loading import quantization_method

    if method := quantization_method(source):
        raise PreflightError(
            f"{source} is quantized already, by {method}",
            "quantize the full model: it knows what the packed one lost",
        )


def _be_quiet() -> None:
    """Settings that libraries read when they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait make the many small steps of GPTQ 20 times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _manifest(
    config: QuantizeConfig,
    quantized: Quantized,
    rows: list[list[int]],
    mix: calibration.Mix,
    sizes_mb: tuple[float, float],
) -> dict[str, Any]:
    return {
        "method": config.quantize.method,
        **quantized.facts,
        "ignore": list(config.quantize.ignore),
        "calibration": {
            "rows": len(rows),
            "training_rows": len(mix.training) if rows else 0,
            "general_rows": len(mix.general) if rows else 0,
            "tokens": sum(map(len, rows)),
            "sha256": calibration.digest(rows) if rows else None,
        },
        "libraries": {name: version(name) for name in quantized.libraries},
        "size_mb": {"before": round(sizes_mb[0], 3), "after": round(sizes_mb[1], 3)},
    }
