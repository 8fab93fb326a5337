"""``serve``: start the real engine, ask it, stop it: the proof that a model can be served."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from toolkit.errors import EngineError
from toolkit.recipe.base import Section
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Kind, StageContext, StageResult

if TYPE_CHECKING:
    from toolkit.engines.client import Message
    from toolkit.engines.server import Server
    from toolkit.proof import EngineProof

ROWS_ASKED = 2
"""Held-out rows that stand in for questions."""
ANSWER_TOKENS = 128


class ServeConfig(Section):
    """What decides the answers, and where and how long the server may take to start."""

    subject: str
    name: str
    serve: ServeSection
    max_length: int
    system: str | None = None
    """System prompt of the plain questions; held-out rows bring their own."""
    digests: dict[str, str] = {}
    """Digest of every adapter folder of ``serve.adapters``."""


@dataclass(frozen=True)
class Question:
    """What is asked, and what the dataset says the answer is."""

    messages: tuple[Message, ...]
    expected: str | None = None
    tools: tuple[Any, ...] = ()

    @property
    def text(self) -> str:
        """The user's last words."""
        return str(self.messages[-1]["content"])


class Serve:
    """Inputs ``model`` and perhaps ``adapter``, ``dataset``.

    Writes ``certificate.json``, ``answers.json``, ``engine.log``, ``startup.json``.

    The port is always a free one: this server is for the proof alone, and a busy ``serve.port`` must not stop a run.
    """

    name: ClassVar[str] = "serve"
    produces: ClassVar[Kind] = Kind.report
    revision: ClassVar[int] = 2
    environment: ClassVar[str] = "core"

    def run(self, config: ServeConfig, ctx: StageContext) -> StageResult:
        """Start, wait until healthy, prove what is served, ask every question over the OpenAI API, stop.

        Raises:
            EngineError: The engine did not start, or an answer was empty.
            ProofError: What is served is not what was trained.
        """
        from toolkit.engines import draft_folder
        from toolkit.engines.foreground import adapter_paths
        from toolkit.engines.server import running
        from toolkit.proof import certificate

        asked = questions(config, ctx)
        adapters = adapter_paths(ctx.inputs, config.serve, config.name, ctx.recipe_dir)
        with running(
            config.serve.engine,
            ctx.interpreters[config.serve.engine],
            ctx.inputs["model"].path,
            adapters,
            config.serve.model_copy(update={"port": 0}),
            name=config.name,
            max_length=config.max_length,
            device=ctx.device,
            log=ctx.output / "engine.log",
            draft=draft_folder(config.serve, ctx.recipe_dir),
            trust_remote_code=ctx.inputs["model"].trusts_code,
            on_phase=lambda phase, seconds: ctx.progress(seconds, 0, "s", phase=phase),
        ) as server:
            startup = {"seconds": round(server.start_seconds, 2), "phases": dict(server.phases)}
            (ctx.output / "startup.json").write_text(json.dumps(startup, indent=2))
            ctx.note(f"{config.serve.engine} is healthy after {server.start_seconds:.0f} s")
            proof = prove(server, adapters, config, ctx)
            answers = ask_all(server, asked, config.max_length, ctx)
        given = certify(proof, server, config, ctx)
        (ctx.output / "answers.json").write_text(json.dumps(answers, indent=2, ensure_ascii=False))
        own = answers_of(answers, config.name)
        refuse_empty(own)
        metrics = summary(own) | certificate.metrics(proof)
        metrics |= {"start_seconds": server.start_seconds, "answers": len(answers)}
        return StageResult(
            metrics=metrics,
            facts={
                "models": list(server.models),
                "engine": config.serve.engine,
                "phases": dict(server.phases),
                "certificate": given["id"],
            },
        )


def prove(
    server: Server, adapters: Mapping[str, Path], config: ServeConfig, ctx: StageContext
) -> EngineProof:
    """Prove everything that the engine serves.

    Raises:
        ProofError: It is not what was trained.
    """
    from toolkit.proof import ProofTarget, ServedAdapter, proofs

    names = list(server.models)
    served = tuple(
        ServedAdapter(name, server.models[name], path, run_of(path), path.name)
        for name, path in adapters.items()
    )
    model = ctx.inputs["model"].path
    target = ProofTarget(
        url=server.url,
        engine=config.serve.engine,
        model_id=server.models[names[0]],
        name=names[0],
        folder=model,
        max_length=config.max_length,
        adapters=served,
        settings=config.serve.proof,
        dtype=config.serve.dtype,
        device=ctx.device,
        run_id=run_of(model),
    )
    return proofs.prove(target, ctx.note)


def certify(
    proof: EngineProof, server: Server, config: ServeConfig, ctx: StageContext
) -> dict[str, Any]:
    """Write ``certificate.json``; return it."""
    from toolkit.proof.certificate import certificate

    fingerprints = {
        role: ctx.inputs[role].fingerprint for role in ("model", "adapter") if role in ctx.inputs
    }
    given = certificate([proof], name=config.name, phases=server.phases, fingerprints=fingerprints)
    text = json.dumps(given, indent=1, ensure_ascii=False)
    (ctx.output / "certificate.json").write_text(text + "\n")
    ctx.note(f"proven: certificate {given['id'][:16]}")
    return given


def run_of(folder: Path) -> str | None:
    """MLflow run that made a folder, where its manifest says so."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    run_id = (manifest.get("mlflow") or {}).get("run_id")
    return str(run_id) if run_id else None


def questions(config: ServeConfig, ctx: StageContext) -> list[Question]:
    """The recipe's questions, or the first held-out rows.

    Raises:
        EngineError: There is neither.
    """
    if config.serve.questions:
        system = ({"role": "system", "content": config.system},) if config.system else ()
        return [
            Question((*system, {"role": "user", "content": text}))
            for text in config.serve.questions
        ]
    found = held_out(ctx) if "dataset" in ctx.inputs else []
    if not found:
        raise EngineError(
            "there is nothing to ask the served model: no question and no held-out conversation",
            "set serve.questions in the recipe",
        )
    return found


def held_out(ctx: StageContext) -> list[Question]:
    """The first conversations of the held-out split that end with an assistant's turn."""
    with (ctx.inputs["dataset"].path / "heldout.jsonl").open() as lines:
        rows = (json.loads(line) for line in lines)
        chats = (
            row
            for row in rows
            if len(row.get("messages", ())) > 1 and row["messages"][-1]["role"] == "assistant"
        )
        return [
            Question(
                tuple(row["messages"][:-1]),
                row["messages"][-1].get("content"),
                tuple(row.get("tools") or ()),
            )
            for row in islice(chats, ROWS_ASKED)
        ]


def ask_all(
    server: Server, asked: Sequence[Question], max_length: int, ctx: StageContext
) -> list[dict[str, Any]]:
    """Ask every model every question, greedily; one record each."""
    answers: list[dict[str, Any]] = []
    total = len(server.models) * len(asked)
    for model, model_id in server.models.items():
        for question in asked:
            ctx.progress(len(answers), total, "answers", model=model)
            options: dict[str, Any] = {"tools": list(question.tools)} if question.tools else {}
            server.check()
            reply = server.client.chat(
                model_id,
                question.messages,
                temperature=0,
                max_tokens=min(ANSWER_TOKENS, max_length // 2),
                **options,
            )
            answers.append(
                {
                    "model": model,
                    "question": question.text,
                    "answer": reply.text,
                    "expected": question.expected,
                    "exact_match": None
                    if question.expected is None
                    else reply.text.strip() == question.expected.strip(),
                    "finish_reason": reply.finish_reason,
                    "prompt_tokens": reply.prompt_tokens,
                    "completion_tokens": reply.completion_tokens,
                    "seconds": round(reply.seconds, 3),
                    "tokens_per_second": round(reply.completion_tokens / reply.seconds, 2),
                }
            )
    ctx.progress(total, total, "answers")
    return answers


def refuse_empty(answers: Sequence[dict[str, Any]]) -> None:
    """Raise :class:`EngineError` when an answer has no text: a model that says nothing is not served."""
    silent = [answer for answer in answers if not answer["answer"].strip()]
    if silent:
        first = silent[0]
        raise EngineError(
            f"{len(silent)} of {len(answers)} answers are empty; {first['model']!r} said nothing to "
            f"{first['question']!r} (it stopped by {first['finish_reason']!r})",
            "compare the chat template of the served folder with that of training, and look at `toolkit evaluate`",
        )


def summary(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Speed over all answers and, where the dataset knows the answer, exact match."""
    seconds = sum(answer["seconds"] for answer in answers)
    metrics = {"tokens_per_second": sum(a["completion_tokens"] for a in answers) / seconds}
    scored = [answer["exact_match"] for answer in answers if answer["exact_match"] is not None]
    return metrics | ({"exact_match": sum(scored) / len(scored)} if scored else {})


def answers_of(answers: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Answers of the subject: not those of the base that is asked beside its adapters for contrast."""
    beside = f"{name}-base"
    return [a for a in answers if a["model"] != beside] or list(answers)
