"""How a model behaves, full and quantized: perplexity and a few answers, since perplexity alone has passed garbage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.quantizers import Advance

if TYPE_CHECKING:
    from toolkit.data.store import TokenRow

NEW_TOKENS = 48
BATCH_SIZE = 8


@dataclass(frozen=True)
class Probe:
    """What is asked of both models.

    Attributes:
        held_out: Tokenized rows that calibration did not see; may be empty.
        questions: Conversations that wait for an answer: ``{"messages": [...], "tools": optional}``.
    """

    held_out: Sequence[TokenRow]
    questions: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Behaviour:
    """What came back.

    Attributes:
        perplexity: Over trained tokens of the held-out rows; None without rows.
        answers: To each question.
        size_mb: Weights on disk, 10^6 bytes.
    """

    perplexity: float | None
    answers: tuple[str, ...]
    size_mb: float


def measure(
    folder: Path,
    probe: Probe,
    device: str,
    advance: Advance,
    *,
    trust_remote_code: bool = False,
    also: Callable[[Any], None] = lambda _: None,
) -> Behaviour:
    """Load a model folder with Transformers, ask, and let go of it; ``also`` is given the loaded model."""
    from toolkit.data.render import question_ids
    from toolkit.evaluation.generation import generate
    from toolkit.evaluation.loading import load_model, load_tokenizer, release

    model = load_model(folder, device, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    also(model)
    perplexity = _perplexity(model, probe.held_out, advance)
    prompts = [question_ids(tokenizer, q["messages"], q.get("tools")) for q in probe.questions]
    limits = [NEW_TOKENS] * len(prompts)
    answers = dict(generate(model, tokenizer, prompts, limits=limits, batch_size=BATCH_SIZE))
    del model
    release(device)
    return Behaviour(
        perplexity, tuple(answers[index] for index in range(len(prompts))), weights_mb(folder)
    )


def weights_mb(folder: Path) -> float:
    """Size of the safetensors files, 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def _perplexity(model: Any, rows: Sequence[TokenRow], advance: Advance) -> float | None:
    from toolkit.evaluation.perplexity import row_losses

    total, tokens = 0.0, 0
    for done, (_, loss, count) in enumerate(
        row_losses(model, rows, batch_size=BATCH_SIZE), start=1
    ):
        total, tokens = total + loss, tokens + count
        advance(done, len(rows), "held-out rows")
    return math.exp(total / tokens) if tokens else None
