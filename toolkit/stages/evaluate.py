"""``evaluate``: how good one model is on the held-out rows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

from toolkit.errors import DataError, NotInstalledError
from toolkit.evaluation.interval import Estimate, mean_interval, perplexity_interval
from toolkit.evaluation.metrics import PERPLEXITY, Metric, load_metric
from toolkit.evaluation.partial import PartialResults
from toolkit.evaluation.report import Report, worst, write_rows
from toolkit.evaluation.rows import HeldoutRow, choose, read_rows
from toolkit.recipe.base import Section
from toolkit.recipe.evaluate import LmEvalSection
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Kind, StageContext, StageResult


class EvaluateConfig(Section):
    """What decides the scores of one model."""

    subject: str
    metrics: tuple[str, ...]
    max_rows: int
    max_new_tokens: int
    batch_size: int
    max_length: int
    through: Literal["transformers", "engine"]
    engine: ServeSection | None = None
    """How to serve, with ``through: engine`` or ``lm_eval``."""
    lm_eval: LmEvalSection | None = None
    digests: dict[str, str] = {}
    """sha256 of the user's metric files."""


class Evaluate:
    """Inputs ``model``, ``dataset`` and perhaps ``adapter``. Writes ``rows.jsonl``, ``report.json``, ``report.md``."""

    name: ClassVar[str] = "evaluate"
    produces: ClassVar[Kind] = Kind.report
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "quantize"

    def run(self, config: EvaluateConfig, ctx: StageContext) -> StageResult:
        """Generate an answer to every held-out row and score it.

        Raises:
            DataError: No held-out row has an answer to compare with, or a metric cannot score one.
            EngineError: The engine did not start, refused a request or died.
            NotInstalledError: ``through: engine`` without the engine's interpreter, or lm-eval is missing.
        """
        return _Evaluation(config, ctx).run()


class _Evaluation:
    """One run: what is asked, what came back so far."""

    def __init__(self, config: EvaluateConfig, ctx: StageContext) -> None:
        self.config, self.ctx = config, ctx
        self.metrics: dict[str, Metric] = {
            name: load_metric(name, ctx.recipe_dir) for name in config.metrics if name != PERPLEXITY
        }
        dataset = ctx.inputs["dataset"].path
        self.rows = choose(read_rows(dataset / "heldout.jsonl"), config.max_rows)
        self.asked = [row for row in self.rows if row.reference is not None] if self.metrics else []
        if not self.rows or (self.metrics and not self.asked):
            raise DataError(
                f"none of the {len(self.rows)} held-out rows ends with an assistant's answer to compare with",
                "hold out conversations (data.heldout), or measure perplexity alone",
            )
        ctx.state.mkdir(parents=True, exist_ok=True)
        self.answers = PartialResults(ctx.state / "answers.jsonl", resume=ctx.resume)
        self.losses = PartialResults(ctx.state / "losses.jsonl", resume=ctx.resume)

    def run(self) -> StageResult:
        from toolkit.evaluation.loading import load_tokenizer

        model = self.ctx.inputs["model"]
        tokenizer = load_tokenizer(model.path, trust_remote_code=model.trusts_code)
        waiting = [row for row in self.asked if row.id not in self.answers]
        if len(waiting) < len(self.asked):
            self.ctx.note(
                f"{len(self.asked) - len(waiting)} rows were scored before the interruption"
            )
        unmeasured = (
            [row for row in self.rows if row.id not in self.losses]
            if self._wants_perplexity
            else []
        )
        in_process = waiting if self.config.through == "transformers" else []
        if in_process or unmeasured:
            self._through_transformers(tokenizer, in_process, unmeasured)
        extra: dict[str, float] = {}
        if (self.config.through == "engine" and waiting) or self.config.lm_eval:
            extra = self._through_engine(
                tokenizer, waiting if self.config.through == "engine" else []
            )
        return self._report(extra)

    @property
    def _wants_perplexity(self) -> bool:
        return PERPLEXITY in self.config.metrics

    def _through_transformers(
        self, tokenizer: Any, waiting: Sequence[HeldoutRow], unmeasured: Sequence[HeldoutRow]
    ) -> None:
        from toolkit.data.render import prompt_ids
        from toolkit.evaluation.generation import generate
        from toolkit.evaluation.loading import load_model, release

        source, adapter = self.ctx.inputs["model"], self.ctx.inputs.get("adapter")
        self.ctx.note("loading the model")
        model = load_model(
            source.path,
            self.ctx.device,
            adapter.path if adapter else None,
            trust_remote_code=source.trusts_code,
        )
        if waiting:
            prompts = [prompt_ids(tokenizer, row.data) for row in waiting]
            limits = [
                self._limit(row, prompt) for row, prompt in zip(waiting, prompts, strict=True)
            ]
            self._score(
                waiting,
                generate(
                    model,
                    tokenizer,
                    prompts,
                    limits=limits,
                    batch_size=self.config.batch_size,
                    on_token=self._show_token,
                ),
            )
        if unmeasured:
            self._measure(model, unmeasured)
        del model
        release(self.ctx.device)

    def _through_engine(self, tokenizer: Any, waiting: Sequence[HeldoutRow]) -> dict[str, float]:
        from toolkit.data.render import prompt_ids
        from toolkit.evaluation import lm_eval
        from toolkit.evaluation.endpoint import Endpoint

        section = self.config.engine or ServeSection()
        with self._server(section) as server:
            endpoint = Endpoint(server.url, server.models[self.config.subject])
            limits = [self._limit(row, prompt_ids(tokenizer, row.data)) for row in waiting]
            concurrent = min(section.max_concurrent, self.config.batch_size)
            self._score(waiting, endpoint.generate(waiting, limits=limits, concurrent=concurrent))
            if self.config.lm_eval is None:
                return {}
            self.ctx.note(f"lm-eval: {', '.join(self.config.lm_eval.tasks)}")
            folder = self.ctx.inputs["model"].path
            return lm_eval.run(
                self.config.lm_eval,
                server.url,
                server.models[self.config.subject],
                tokenizer=folder,
                output=self.ctx.output / "lm_eval",
                concurrent=concurrent,
            )

    def _server(self, section: ServeSection) -> AbstractContextManager[Any]:
        from toolkit.engines import draft_folder
        from toolkit.engines.server import running

        interpreter = self.ctx.interpreters.get(section.engine)
        if interpreter is None:
            raise NotInstalledError(
                f"evaluate goes through the engine {section.engine}, which has no environment here",
                f"toolkit env sync {section.engine}, or write evaluate.through: transformers",
            )
        adapter = self.ctx.inputs.get("adapter")
        self.ctx.note(f"starting {section.engine}")
        server: AbstractContextManager[Any] = running(
            section.engine,
            interpreter,
            self.ctx.inputs["model"].path,
            adapters={self.config.subject: adapter.path} if adapter else {},
            serve=section.model_copy(
                update={"host": "127.0.0.1", "port": 0, "live_adapters": False}
            ),
            name=self.config.subject,
            max_length=self.config.max_length,
            device=self.ctx.device,
            log=self.ctx.output / "engine.log",
            draft=draft_folder(section, self.ctx.recipe_dir),
            trust_remote_code=self.ctx.inputs["model"].trusts_code,
        )
        return server

    def _limit(self, row: HeldoutRow, prompt: Sequence[int]) -> int:
        """New tokens that still fit into the served context, the same whichever way the model is asked."""
        room = self.config.max_length - len(prompt)
        if room < 1:
            raise DataError(
                f"the question of held-out row {row.id} has {len(prompt)} tokens, and model.max_length is "
                f"{self.config.max_length}: there is no room for an answer",
                "raise model.max_length",
            )
        return min(self.config.max_new_tokens, room)

    def _score(self, rows: Sequence[HeldoutRow], answers: Iterable[tuple[int, str]]) -> None:
        start, before = time.monotonic(), len(self.answers)
        for done, (index, prediction) in enumerate(answers, start=1):
            row = rows[index]
            scores = {
                name: metric(prediction, row.reference or "", row.data)
                for name, metric in self.metrics.items()
            }
            self.answers.add(row.id, {"prediction": prediction, "scores": scores})
            speed = done / (time.monotonic() - start)
            self.ctx.progress(
                before + done,
                len(self.asked),
                "rows",
                **self._running(),
                rows_per_s=round(speed, 2),
            )

    def _show_token(self, token: int) -> None:
        self.ctx.progress(len(self.answers), len(self.asked), "rows", token=token)

    def _running(self) -> dict[str, float]:
        """Mean of the first metric so far."""
        name = next(iter(self.metrics))
        scores = [
            self.answers[row.id]["scores"][name] for row in self.asked if row.id in self.answers
        ]
        return {name: round(sum(scores) / len(scores), 4)}

    def _measure(self, model: Any, rows: Sequence[HeldoutRow]) -> None:
        from toolkit.data.store import TokenStore
        from toolkit.evaluation.perplexity import row_losses

        store = TokenStore(self.ctx.inputs["dataset"].path / "tokens" / "heldout")
        tokens = [store[row.index] for row in rows]
        for index, loss, count in row_losses(model, tokens, batch_size=self.config.batch_size):
            self.losses.add(rows[index].id, {"loss": loss, "tokens": count})
            self.ctx.progress(len(self.losses), len(self.rows), "rows for perplexity")

    def _report(self, extra: Mapping[str, float]) -> StageResult:
        results = list(self._results())
        write_rows(self.ctx.output / "rows.jsonl", results)
        estimates = self._estimates()
        scored = len(self.asked) if self.metrics else len(self.rows)
        skipped = len(self.rows) - scored
        report = Report(
            self.config.subject, self.config.through, scored, skipped, estimates, worst(results)
        )
        report.write(self.ctx.output)
        self.ctx.log(0, **report.metrics(), **extra)
        intervals = {name: [e.low, e.high] for name, e in estimates.items()}
        return StageResult(
            {**report.metrics(), **extra}, {"subject": self.config.subject, "ci95": intervals}
        )

    def _results(self) -> Iterator[dict[str, Any]]:
        for row in self.asked:
            answer = self.answers[row.id]
            yield {
                "id": row.id,
                "prompt": list(row.prompt),
                "prediction": answer["prediction"],
                "reference": row.reference,
                "scores": answer["scores"],
            }

    def _estimates(self) -> dict[str, Estimate]:
        found = {
            name: mean_interval([self.answers[row.id]["scores"][name] for row in self.asked])
            for name in self.metrics
        }
        if self._wants_perplexity:
            losses = [self.losses[row.id] for row in self.rows]
            found[PERPLEXITY] = perplexity_interval(
                [(each["loss"], each["tokens"]) for each in losses]
            )
        return {name: found[name] for name in self.config.metrics}
