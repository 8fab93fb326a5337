"""What goes into a ``reference.json``: ids from the training path's rendering, logprobs of models at hand.

Torch and transformers are needed here and in ``training_side.py`` alone (imported inside).

Legend: N tokens of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from toolkit import __version__
from toolkit.proof import conversations, identity
from toolkit.proof.engine_calls import TOP
from toolkit.proof.reference import PLACES, Kind, Logprobs, Reference, StoredConversation, StoredRow

PROMPT_TOKENS = 64
"""Tokens before those that are scored, at most: a CPU reads 30 a second."""
REPEATS = 8
"""Scored tokens of a row."""
HELD_OUT_ROWS = 6
"""Held-out rows that are scored."""
HELD_OUT_CHATS = 3
"""Held-out rows whose question is compared token by token."""
SCORED = ("no system", "system", "emoji", "white space")
"""Stored conversations that are scored too, with the first tokens of :data:`ANSWER` behind them."""
ANSWER = 'Your order is on its way. It should be there within two days: {"eta": 2}'
LIBRARIES = ("torch", "transformers", "tokenizers", "peft")

Ids = tuple[int, ...]


class Recorder:
    """Collects what a ``reference.json`` holds while a stage has the models at hand.

    Args:
        folder: Has the tokenizer and the chat template.
        dataset: Folder of the dataset artifact, if there is one: some held-out rows are stored too.
        trust_remote_code: Run Python code that lies in ``folder``.
    """

    def __init__(
        self, folder: Path, dataset: Path | None = None, *, trust_remote_code: bool = False
    ) -> None:
        from toolkit.data.encode import load_tokenizer

        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        self.conversations = tuple(render(tokenizer, dataset))
        self.rows = dict(rows(tokenizer, self.conversations, dataset))
        self._scores: dict[str, dict[str, tuple[Logprobs, tuple[dict[int, float], ...]]]] = {}
        self.not_scored: str | None = None

    def score(self, side: str, model: Any) -> None:
        """Let a loaded model score all rows; ``side`` is ``model``, ``beside`` or the name of a fault."""
        self._scores[side] = {
            name: score(model, ids, start) for name, (ids, start) in self.rows.items()
        }

    def write(
        self,
        folder: Path,
        kind: Kind,
        *,
        precision: str,
        trained_on: str | None = None,
        base: Path | None = None,
        made_from: Path | None = None,
    ) -> Reference:
        """Write the file into a folder that has its weights, tokenizer and template by now."""
        digests: dict[str, str | None] = dict(identity.folder_digests(folder))
        digests |= {"base": _weights(base), "made_from": _weights(made_from)}
        scored = self._stored_rows() if "model" in self._scores else ()
        reference = Reference(
            kind,
            digests,
            self.conversations,
            scored,
            precision,
            trained_on,
            _versions(),
            self.not_scored,
        )
        reference.write(folder)
        return reference

    def _stored_rows(self) -> tuple[StoredRow, ...]:
        sides = dict(self._scores)
        own, beside = sides.pop("model"), sides.pop("beside", None)
        return tuple(
            StoredRow(
                name,
                ids,
                start,
                own[name][0],
                own[name][1],
                beside[name][0] if beside else None,
                {fault: scores[name][0] for fault, scores in sides.items()},
                beside[name][1] if beside else None,
            )
            for name, (ids, start) in self.rows.items()
        )


def render(tokenizer: Any, dataset: Path | None = None) -> Iterator[StoredConversation]:
    """Stored and held-out conversations with the ids of the training path; none without a chat template."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return
    specials = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    yield from (
        _rendered(tokenizer, conversation)
        for conversation in (
            *conversations.stored(template, [token for token in specials if token]),
            *conversations.held_out(_held_out(dataset), HELD_OUT_CHATS),
        )
    )


def _rendered(tokenizer: Any, conversation: conversations.Conversation) -> StoredConversation:
    from jinja2 import TemplateError

    from toolkit.data.render import question_ids

    given = (conversation.name, conversation.messages, conversation.tools, conversation.kwargs)
    tools = list(conversation.tools) or None
    try:
        ids = question_ids(
            tokenizer, [dict(m) for m in conversation.messages], tools, **conversation.kwargs
        )
    except (
        TemplateError,
        TypeError,
    ) as error:  # what a template raises on purpose or by a missing key
        return StoredConversation(*given, refused=str(error) or type(error).__name__)
    return StoredConversation(*given, ids=tuple(ids))


def rows(
    tokenizer: Any, stored: Sequence[StoredConversation], dataset: Path | None
) -> Iterator[tuple[str, tuple[Ids, int]]]:
    """Names, ids and first scored position of the rows."""
    answer = tokenizer.encode(ANSWER, add_special_tokens=False)
    chosen = [c for c in stored if c.name in SCORED and c.refused is None]
    for n, conversation in enumerate(chosen):
        yield conversation.name, row((*conversation.ids, *answer), len(conversation.ids) + n)
    if not chosen:
        ids = tuple(tokenizer.encode(ANSWER))
        yield "plain text", row(ids, len(ids) // 2)
    yield from _held_out_rows(dataset, set(tokenizer.all_special_ids))


def row(ids: Sequence[int], start: int) -> tuple[Ids, int]:
    """The tokens before ``start``, shortened at their beginning, and then the one at ``start`` over and over."""
    before = tuple(int(i) for i in ids[max(start - PROMPT_TOKENS, 0) : start])
    return (*before, *[int(ids[start])] * REPEATS), len(before)


def _held_out_rows(
    dataset: Path | None, specials: AbstractSet[int]
) -> Iterator[tuple[str, tuple[Ids, int]]]:
    """Held-out answers, cut at their beginning or further on; never at a token that ends a turn."""
    from toolkit.data.store import TokenStore

    if dataset is None or not (dataset / "tokens" / "heldout").is_dir():
        return
    store = TokenStore(dataset / "tokens" / "heldout")
    for n in range(min(len(store), HELD_OUT_ROWS)):
        ids, trained = store[n].ids, store[n].trained.nonzero()[0]
        places = [int(p) for p in trained if p > 0 and int(ids[p]) not in specials]
        if places:
            yield f"held-out {n}", row(ids, places[n % 3 * len(places) // 3])


def _held_out(dataset: Path | None) -> list[dict[str, Any]]:
    file = dataset / "heldout.jsonl" if dataset else None
    if file is None or not file.is_file():
        return []
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(HELD_OUT_ROWS), strict=False)]


def score(
    model: Any, ids: Sequence[int], start: int
) -> tuple[Logprobs, tuple[dict[int, float], ...]]:
    """Logprobs [N - start] of ``ids[start:]`` under a causal model, and the most likely ids at each place."""
    import torch

    tokens = torch.tensor(ids, dtype=torch.long, device=model.device)[None]
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, start - 1 : -1].float()
    logprobs = torch.log_softmax(logits, -1)
    own = logprobs.gather(-1, tokens[0, start:, None])[:, 0].tolist()
    best = logprobs.topk(min(TOP, logprobs.shape[-1]), -1)
    top = tuple(
        {int(i): round(lp, PLACES) for i, lp in zip(indices, values, strict=True)}
        for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    return tuple(round(lp, PLACES) for lp in own), top


def _weights(folder: Path | None) -> str | None:
    return identity.weights_digest(folder) if folder else None


def _versions() -> dict[str, str]:
    found = {"toolkit": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
