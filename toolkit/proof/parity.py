"""Token parity: the live server turns stored conversations into the ids that the training path made of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from toolkit.engines.client import RefusedError
from toolkit.errors import EngineError, ProofError
from toolkit.proof import ParityProof
from toolkit.proof.live import Live
from toolkit.proof.reference import StoredConversation

AROUND = 6
"""Tokens shown before and after the first difference."""
HINT = (
    "serve with the template and tokenizer that lie in the exported folder; a template changed by hand or by the "
    "engine is not the trained one (serve.proof.may_differ: [NAME] if no client sends such conversations)"
)


def first_difference(trained: Sequence[int], served: Sequence[int]) -> int | None:
    """Position of the first id that differs, or where one of them ends; None when they are equal."""
    pairs = enumerate(zip(trained, served, strict=False))
    place = next((n for n, (a, b) in pairs if a != b), min(len(trained), len(served)))
    return None if place == len(trained) == len(served) else place


def show(
    trained: Sequence[int], served: Sequence[int], place: int, text: Callable[[int], str]
) -> str:
    """The first difference in context, both sides, token by token.

    Args:
        trained: Ids of the training path.
        served: Ids of the engine.
        place: Where they part.
        text: Token id -> its text.
    """
    start = max(place - AROUND, 0)
    before = "".join(text(i) for i in trained[start:place])
    lines = [f"after {('...' if start else '') + before!r}"]
    for side, ids in (("training", trained), ("server", served)):
        shown = [f"{text(i)!r} ({i})" for i in ids[place : place + AROUND]]
        lines.append(f"  {side:9}{' '.join(shown) if shown else 'nothing: it ends here'}")
    return "\n".join(lines)


def parity(
    live: Live,
    model_id: str,
    name: str,
    conversations: Sequence[StoredConversation],
) -> ParityProof | None:
    """Compare every stored conversation; None where none is stored (the model has no chat template).

    Args:
        live: The engine.
        model_id: Model or adapter whose chats are compared.
        name: Its public name, for the message.
        conversations: Of its folder's reference.

    Raises:
        ProofError: A conversation gives other ids, or one side refuses it and the other does not.
        EngineError: The engine does not answer.
    """
    if not conversations:
        return None
    begin = time.monotonic()
    allowed, too_long, refused, tokens = [], [], 0, 0
    for conversation in conversations:
        served = _served(live, model_id, conversation)
        problem = None
        if isinstance(served, RefusedError):
            if conversation.refused is not None:
                refused += 1
            elif len(conversation.ids) >= live.target.max_length:
                too_long.append(conversation.name)
            else:
                problem = f"the server refuses it: {served.reason[:300]}"
        else:
            problem = _problem(live, conversation, served)
            tokens += len(served)
        if problem and conversation.name in live.target.settings.may_differ:
            allowed.append(conversation.name)
        elif problem:
            raise ProofError(
                f"{name}: the conversation {conversation.name!r} is not what training saw: {problem}",
                HINT,
            )
    return ParityProof(
        conversations=len(conversations) - len(allowed) - len(too_long),
        tokens=tokens,
        refused=refused,
        allowed=tuple(allowed),
        too_long=tuple(too_long),
        seconds=round(time.monotonic() - begin, 3),
    )


def _served(
    live: Live, model_id: str, conversation: StoredConversation
) -> list[int] | RefusedError:
    try:
        return live.ids(model_id, conversation)
    except RefusedError as error:
        if (
            error.status == 404
        ):  # the engine does not know the model or the route: no word on the template
            raise EngineError(error.message, "the engine's log says why") from error
        return error


def _problem(live: Live, conversation: StoredConversation, served: Sequence[int]) -> str | None:
    if conversation.refused is not None:
        return f"the training path's template refuses it ({conversation.refused}), and the server renders it"
    place = first_difference(conversation.ids, served)
    if place is None:
        return None
    return (
        f"token {place} differs ({len(conversation.ids)} tokens in training, {len(served)} on the server), "
        + show(conversation.ids, served, place, live.text)
    )
