"""Rows that are two sequences: a better and a worse answer, or an answer and the bare question.

The first sequence is what any row is; the second stands beside it in a store of its own, row by
row. Both go through the same template and tokenizer, so their questions are the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from toolkit.data.collect import Row
from toolkit.data.encode import Encoded, Encoder
from toolkit.data.formats import Body
from toolkit.data.ledger import SplitCounts
from toolkit.data.store import TokenRow
from toolkit.errors import DataError
from toolkit.recipe.objectives import Objective

Second = Callable[[Body], Body | None]
"""The body of a row's second sequence; None where it has none."""


def with_worse_answer(body: Body) -> Body | None:
    """The same question with the rejected answer."""
    if "rejected" not in body:
        return None
    return {**body, "messages": [*body["messages"][:-1], body["rejected"]]}


def question_alone(body: Body) -> Body:
    """The conversation up to the question."""
    messages = body["messages"]
    answered = messages[-1]["role"] == "assistant"
    return {**body, "messages": messages[:-1] if answered else messages}


SECOND: Mapping[Objective, tuple[str, Second]] = {
    "dpo": ("rejected", with_worse_answer),
    "orpo": ("rejected", with_worse_answer),
    "grpo": ("prompt", question_alone),
}
"""Name of the second store (``tokens/train-rejected``) and what is in it."""


def encoder_of(
    objective: Objective,
    tokenizer: Any,
    stop_ids: Sequence[int],
    system: str | None,
    *,
    every_answer: bool,
) -> Encoder | TwofoldEncoder:
    """The encoder of rows of an objective; see :class:`Encoder` for the arguments."""
    one = Encoder(
        tokenizer,
        stop_ids,
        system,
        every_answer=every_answer,
        last_answer=objective != "sft",
    )
    return TwofoldEncoder(one, SECOND[objective][1]) if objective in SECOND else one


class TwofoldEncoder:
    """Encodes a row and its second sequence, which becomes :attr:`Encoded.beside`."""

    def __init__(self, encoder: Encoder, second: Second) -> None:
        self._encoder = encoder
        self._second = second

    def encode(
        self, rows: Sequence[Row], counts: SplitCounts, *, drop_invalid: bool
    ) -> Iterator[Encoded]:
        """Yield rows in order; one of which either sequence cannot be rendered is invalid.

        Raises:
            DataError: As :meth:`Encoder.encode`; or both sequences of a pair are the same tokens.
        """
        made = [(row, self._second(row.body)) for row in rows]
        others = {id(row): replace(row, body=body) for row, body in made if body is not None}
        apart = SplitCounts()
        first = {
            id(one.row): one
            for one in self._encoder.encode(rows, counts, drop_invalid=drop_invalid)
        }
        second = {
            id(one.row): TokenRow(one.ids, one.trained)
            for one in self._encoder.encode(list(others.values()), apart, drop_invalid=drop_invalid)
        }
        for row in rows:
            one, other = first.get(id(row)), others.get(id(row))
            if one is None:
                continue
            beside = second.get(id(other)) if other else _nothing()
            if beside is None or self._same(one, beside):
                self._refuse(row, counts, drop_invalid=drop_invalid)
            else:
                yield replace(one, beside=beside)

    def _same(self, one: Encoded, beside: TokenRow) -> bool:
        """Whether a pair has become one sequence; a question may be all that a row has."""
        return bool(beside.trained.any()) and one.ids.tolist() == beside.ids.tolist()

    def _refuse(self, row: Row, counts: SplitCounts, *, drop_invalid: bool) -> None:
        text = f"{row.where}: chosen and rejected become the same tokens, or one cannot be rendered"
        if not drop_invalid:
            raise DataError(text, "mend the row, or set data.on_invalid: drop")
        counts.sequences -= 1
        counts.invalid += 1
        counts.example("unreadable", text)


def _nothing() -> TokenRow:
    """The second sequence of a held-out row that has none."""
    import numpy as np

    return TokenRow(np.zeros(0, np.int32), np.zeros(0, bool))
