"""Batches of rows through a fast tokenizer: ids, loss masks and what the ledger counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.data.collect import Row
from toolkit.data.formats import Body
from toolkit.data.ledger import SplitCounts
from toolkit.data.render import View, last_view, mask, template_of, views, with_system
from toolkit.data.store import TokenRow
from toolkit.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BATCH = 512
"""Sequences tokenized at once."""
CHECKED = 200
"""Sequences of each side whose ids are compared with those of ``apply_chat_template``."""


@dataclass(frozen=True)
class Encoded:
    """One sequence, ready to be written. N is its number of tokens."""

    row: Row
    body: Body
    """What stands in the ``.jsonl`` line: of a conversation, as far as this sequence goes."""
    ids: NDArray[np.int32]  # [N]
    trained: NDArray[np.bool_]  # [N]
    stops: tuple[int, ...]
    """Positions of trained stop tokens."""
    turns: int
    joined: int
    beside: TokenRow | None = None
    """The row's second sequence: the worse answer to the same question, or the question alone."""

    @property
    def longest(self) -> int:
        """Tokens of the longer of its sequences."""
        return max(len(self.ids), len(self.beside.ids) if self.beside else 0)

    @property
    def learns(self) -> bool:
        """Whether every sequence that has an answer has a trained token."""
        second = self.beside is None or not len(self.beside.ids) or self.beside.trained.any()
        return bool(self.trained.any() and second)

    def cut(self, length: int) -> Encoded:
        """The first ``length`` tokens."""
        second = self.beside and TokenRow(self.beside.ids[:length], self.beside.trained[:length])
        return replace(
            self,
            ids=self.ids[:length],
            trained=self.trained[:length],
            stops=tuple(s for s in self.stops if s < length),
            beside=second,
        )


class Encoder:
    """Renders and tokenizes rows of one side.

    Args:
        tokenizer: A fast tokenizer of transformers with a chat template.
        stop_ids: Ids at which generation stops, from the model folder; special tokens count as
            well.
        system: For conversations that bring none.
        every_answer: Whether answers that the template rewrites get sequences of their own; without
            it (held-out rows, of which only the last answer is asked for) a row is one sequence.
        last_answer: Whether the last answer alone is trained, as for rows of preference training.

    Raises:
        DataError: The tokenizer is slow (Python), so that it cannot say which characters a token
            covers.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Sequence[int],
        system: str | None,
        *,
        every_answer: bool,
        last_answer: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} has no fast form (tokenizer.json), "
                "which the loss mask needs",
                "use a model folder with tokenizer.json",
            )
        self._tokenizer = tokenizer
        self._system = system
        self._every_answer = every_answer
        self._last_answer = last_answer
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._stop_ids = frozenset({*stop_ids, *added})
        self._left_to_check = CHECKED

    def encode(
        self, rows: Sequence[Row], counts: SplitCounts, *, drop_invalid: bool
    ) -> Iterator[Encoded]:
        """Yield the sequences of a batch of rows, in order.

        Raises:
            TemplateError: The template cannot be trained on.
            DataError: The template refuses a row and ``drop_invalid`` is false, or ids differ from
                the template's own.
        """
        pairs: list[tuple[Row, View | None]] = []
        for row in rows:
            counts.rows += 1
            pairs += [(row, view) for view in self._views(row, counts, drop_invalid=drop_invalid)]
        texts = [view.text if view else row.body["text"] for row, view in pairs]
        for (row, view), encoding in zip(pairs, self._tokenize(texts), strict=True):
            counts.sequences += 1
            yield self._conversation(row, view, encoding) if view else self._text(row)

    def _tokenize(self, texts: list[str]) -> list[Any]:
        # The backend itself: the wrapper around it would build Python lists that nobody reads.
        found: list[Any] = self._tokenizer.backend_tokenizer.encode_batch(
            texts, add_special_tokens=False
        )
        return found

    def _views(
        self, row: Row, counts: SplitCounts, *, drop_invalid: bool
    ) -> list[View] | list[None]:
        from jinja2 import TemplateError as JinjaError

        if "text" in row.body:
            return [None]
        messages = with_system(row.body["messages"], self._system)
        template = template_of(self._tokenizer, row.body.get("tools"))
        try:
            found = (
                [last_view(messages, template)] if self._last_answer else views(messages, template)
            )
        except DataError as error:
            raise type(error)(f"{row.where}: {error.message}", error.hint) from error
        except (JinjaError, TypeError) as error:
            text = f"{row.where}: the chat template refuses the row: {error}"
            if not drop_invalid:
                raise DataError(text, "mend the row, or set data.on_invalid: drop") from error
            counts.invalid += 1
            counts.example("unreadable", text)
            return []
        kept = found if self._every_answer else found[:1]
        if not kept:  # every answer has weight 0
            counts.without_trained += 1
            counts.sequences += 1
            counts.example("without a trained token", f"{row.where}: every answer has weight 0")
        counts.extra_sequences += max(len(kept) - 1, 0)
        return kept

    def _conversation(self, row: Row, view: View, encoding: Any) -> Encoded:
        import numpy as np

        ids = encoding.ids
        found = mask(ids, encoding.offsets, view.text, view.answers, self._stop_ids)
        trained: NDArray[np.bool_] = np.zeros(len(ids), dtype=bool)
        for start, end in found.ranges:
            trained[start:end] = True
        body = {**row.body, "messages": view.messages}
        if self._left_to_check > 0:
            self._left_to_check -= 1
            self._check(row, body, view, ids)
        return Encoded(
            row,
            body,
            np.array(ids, dtype=np.int32),
            trained,
            tuple(found.stops),
            len(view.answers),
            found.joined,
        )

    def _text(self, row: Row) -> Encoded:
        """Plain text as the tokenizer encodes it (with a BOS where it has one), and EOS."""
        import numpy as np

        ids = list(self._tokenizer(row.body["text"], verbose=False)["input_ids"])
        end = self._tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        return Encoded(
            row, row.body, np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool), (), 0, 0
        )

    def _check(self, row: Row, body: Body, view: View, ids: list[int]) -> None:
        """Compare with the tokenizer's own ids of the conversation, which serving relies on."""
        own = self._tokenizer.apply_chat_template(
            view.messages,
            tools=body.get("tools"),
            add_generation_prompt=view.messages[-1]["role"] != "assistant",
            tokenize=True,
            return_dict=False,
        )
        if own == ids:
            return
        place = next(
            (n for n, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b),
            min(len(own), len(ids)),
        )
        raise DataError(
            f"{row.where}: token {place} is {ids[place : place + 1]} here "
            f"but {own[place : place + 1]} by "
            f"apply_chat_template ({len(ids)} and {len(own)} tokens): "
            "training would not see what serving sends",
            "the template depends on time or chance, "
            "or the tokenizer cuts or pads: check tokenizer.json",
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, ready for :class:`Encoder`.

    Offsets that leave out white space (``trim_offsets``) are set right: ids do not change.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code, local_files_only=True
    )
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        keep_spaces_in_offsets(backend)
    return tokenizer


def keep_spaces_in_offsets(backend: Any) -> None:
    """Let offsets of a tokenizer's backend cover white space; ids do not change."""
    from tokenizers import Tokenizer

    value = json.loads(backend.to_str())
    after = value.get("post_processor") or {}
    trimming = [p for p in (after, *after.get("processors", [])) if p.get("trim_offsets")]
    if trimming:
        for processor in trimming:
            processor["trim_offsets"] = False
        backend.post_processor = Tokenizer.from_str(json.dumps(value)).post_processor


def stop_ids(folder: Path) -> tuple[int, ...]:
    """Ids at which generation stops, from ``generation_config.json`` or else ``config.json``."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            value = json.loads(path.read_text()).get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (int(value),)
    return ()


def template_sha256(tokenizer: Any) -> str | None:
    """Digest of the chat template, or None when the tokenizer has none (or several by name)."""
    template = tokenizer.chat_template
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None
