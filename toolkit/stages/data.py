"""``data``: rows of any format become conversations, tokens, a loss mask and a ledger."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from toolkit import digests
from toolkit.data.collect import Row, collect
from toolkit.data.encode import (
    BATCH,
    Encoded,
    load_tokenizer,
    stop_ids,
    template_sha256,
)
from toolkit.data.ledger import Ledger, SplitCounts, counted
from toolkit.data.packing import efficiency, pack
from toolkit.data.store import TokenRow, TokenWriter
from toolkit.data.twofold import SECOND, encoder_of
from toolkit.errors import DataError
from toolkit.recipe.base import Section
from toolkit.recipe.data import DataSection
from toolkit.recipe.objectives import Objective
from toolkit.stages import Kind, StageContext, StageResult

SIDES = ("train", "heldout")


class DataConfig(Section):
    """What decides the bytes of the dataset."""

    data: DataSection
    max_length: int
    seed: int
    digests: dict[str, str] = {}
    """sha256 of every local file that is read, by the path the recipe gives."""
    objective: Objective = "sft"
    """What the rows are for: which formats are read, and what is stored beside each."""
    answer_tokens: int = 0
    """Tokens to keep free after a question, where training writes the answers itself."""


class Data:
    """Input ``model`` (its tokenizer). Writes rows, tokens and ledger.

    ``train.jsonl, heldout.jsonl, tokens/{train,heldout}/, ledger.json, ledger.md``; for pairs also
    ``tokens/{train,heldout}-rejected/``, for prompts ``tokens/{train,heldout}-prompt/``.
    """

    name: ClassVar[str] = "data"
    produces: ClassVar[Kind] = Kind.dataset
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "train"

    def run(self, config: DataConfig, ctx: StageContext) -> StageResult:
        """Read, normalise, split, render and tokenize.

        Raises:
            DataError: Rows broke a rule or a budget of the recipe, or the chat template cannot be
                trained on.
        """
        ctx.note("reading rows")
        found = collect(
            config.data,
            ctx.recipe_dir,
            config.seed,
            lambda n, name: ctx.progress(n, n, "rows read", source=name),
            config.objective,
        )
        ctx.note(
            f"{counted(len(found.train), 'row')} to train, {len(found.heldout)} held out; "
            "loading the tokenizer"
        )
        model = ctx.inputs["model"].path
        tokenizer = load_tokenizer(model, trust_remote_code=ctx.inputs["model"].trusts_code)
        _has_template(tokenizer, [*found.train[:1], *found.heldout[:1]])
        ledger = Ledger(found.sources)
        writing = _Writing(config, ctx, tokenizer, stop_ids(model))
        writing.total = len(found.train) + len(found.heldout)
        lengths = writing.side("train", found.train, ledger.train)
        writing.side("heldout", found.heldout, ledger.heldout)
        _refuse_too_long(config, ledger)
        ledger.check_budgets(config.data.max_dropped, config.data.max_truncated)
        if not lengths:
            raise DataError(
                "no row is left to train on: every one was dropped",
                "raise model.max_length, or mend the rows; see the counts of the budgets",
            )
        packed = len(pack(lengths, config.max_length, config.seed))
        ledger.packed_sequences = packed
        ledger.packing_efficiency = efficiency(lengths, packed, config.max_length)
        ledger.stop_token = writing.stop_token()
        ledger.notes += _notes(ledger, tokenizer, writing)
        ledger.write(ctx.output)
        for note in ledger.notes:
            ctx.note(note)
        return StageResult(
            metrics=ledger.metrics, facts=_facts(ctx.output, ledger, tokenizer, config)
        )


class _Writing:
    """Encodes rows, applies the length policy and writes both forms of every sequence."""

    def __init__(
        self, config: DataConfig, ctx: StageContext, tokenizer: Any, model_stops: tuple[int, ...]
    ) -> None:
        self.total = 0
        self.model_stops = model_stops
        self.seen_stops: Counter[int] = Counter()
        self._config = config
        self._ctx = ctx
        self._tokenizer = tokenizer
        self._done = 0

    def side(self, name: str, rows: list[Row], counts: SplitCounts) -> list[int]:
        """Write one side; return the lengths of its sequences in tokens."""
        with ExitStack() as stack:
            tokens = stack.enter_context(TokenWriter(self._ctx.output / "tokens" / name))
            second = self._second_store(name, stack)
            lines = stack.enter_context(
                (self._ctx.output / f"{name}.jsonl").open("w", encoding="utf-8")
            )
            for one in self._encoded(name, rows, counts):
                kept = self._fit(one, name, counts)
                if kept is None:
                    continue
                line = json.dumps({"id": kept.row.id, **kept.body}, ensure_ascii=False) + "\n"
                for _ in range(kept.row.copies):
                    lines.write(line)
                    tokens.append(TokenRow(kept.ids, kept.trained))
                    if second and kept.beside:
                        second.append(kept.beside)
                self._count(kept, counts)
        counts.measure(tokens.lengths)
        return tokens.lengths

    def _second_store(self, name: str, stack: ExitStack) -> TokenWriter | None:
        if self._config.objective not in SECOND:
            return None
        folder = f"{name}-{SECOND[self._config.objective][0]}"
        return stack.enter_context(TokenWriter(self._ctx.output / "tokens" / folder))

    def stop_token(self) -> str | None:
        """The token that ends most answers."""
        if not self.seen_stops:
            return None
        token: str = self._tokenizer.convert_ids_to_tokens(self.seen_stops.most_common(1)[0][0])
        return token

    def _encoded(self, name: str, rows: list[Row], counts: SplitCounts) -> Iterator[Encoded]:
        encoder = encoder_of(
            self._config.objective,
            self._tokenizer,
            self.model_stops,
            self._config.data.system,
            every_answer=name == "train",
        )
        drop = self._config.data.on_invalid == "drop"
        remaining = iter(rows)
        while batch := list(islice(remaining, BATCH)):
            yield from encoder.encode(batch, counts, drop_invalid=drop)
            self._done += len(batch)
            self._ctx.progress(self._done, self.total, "rows", side=name, tokens=counts.tokens)

    def _fit(self, one: Encoded, name: str, counts: SplitCounts) -> Encoded | None:
        """Apply ``on_too_long``. Held-out rows are never cut: half an answer is no reference."""
        if self._config.objective == "grpo":
            return self._fit_question(one, counts)
        limit, length = self._config.max_length, one.longest
        if length > limit:
            if self._config.data.on_too_long != "truncate" or name == "heldout":
                counts.too_long += 1
                counts.example(
                    "too long", f"{one.row.where}: {length} tokens, model.max_length is {limit}"
                )
                return None
            one = one.cut(limit)
        if not one.learns:
            counts.without_trained += 1
            counts.example(
                "without a trained token",
                f"{one.row.where}: none of the first {one.longest} of {length} tokens is trained",
            )
            return None
        if one.longest < length:
            counts.truncated += 1
            counts.example(
                "truncated", f"{one.row.where}: {length} tokens, model.max_length is {limit}"
            )
        return one

    def _fit_question(self, one: Encoded, counts: SplitCounts) -> Encoded | None:
        """Keep a question that leaves room for an answer: half a question is none, so none is cut."""
        limit, answer = self._config.max_length, self._config.answer_tokens
        length = len(one.beside.ids) if one.beside else len(one.ids)
        if length + answer <= limit:
            return one.cut(limit)  # a reference may be longer than what training would write
        counts.too_long += 1
        counts.example(
            "too long",
            f"{one.row.where}: a question of {length} tokens and an answer of up to {answer}, "
            f"model.max_length is {limit}",
        )
        return None

    def _count(self, one: Encoded, counts: SplitCounts) -> None:
        times = one.row.copies
        counts.written += times
        counts.tokens += times * len(one.ids)
        counts.trained_tokens += times * int(one.trained.sum())
        counts.turns += times * one.turns
        counts.stops += times * len(one.stops)
        counts.joined += times * one.joined
        self.seen_stops.update(int(one.ids[s]) for s in one.stops)


def _has_template(tokenizer: Any, rows: list[Row]) -> None:
    if not tokenizer.chat_template and any("messages" in row.body for row in rows):
        raise DataError(
            "the model has no chat template, so conversations cannot be rendered",
            "set model.chat_template to a Jinja file, or use plain text rows",
        )


def _refuse_too_long(config: DataConfig, ledger: Ledger) -> None:
    number = ledger.dropped["too long"]
    if number and config.data.on_too_long == "refuse":
        examples = [
            e for s in (ledger.train, ledger.heldout) for e in s.examples.get("too long", [])
        ]
        longer = "is" if number == 1 else "are"
        raise DataError(
            f"{counted(number, 'row')} of {ledger.offered} {longer} longer than model.max_length "
            f"{config.max_length}:\n  " + "\n  ".join(examples),
            "raise model.max_length, or set data.on_too_long to drop or truncate",
        )


def _notes(ledger: Ledger, tokenizer: Any, writing: _Writing) -> list[str]:
    """What a user should know before training starts."""
    train, notes = ledger.train, []
    for source in ledger.sources:
        if source.ignored_columns:
            notes.append(
                f"{source.name}: columns that are not read: {', '.join(source.ignored_columns)}"
            )
        if source.duplicates:
            notes.append(f"{source.name}: {counted(source.duplicates, 'duplicate row')}")
    if train.stop_share < 1:
        notes.append(
            f"only {train.stops} of {train.turns} answers ({train.stop_share:.1%}) "
            "train their stop token: "
            "a model that never learns to stop talks on"
        )
    strange = set(writing.seen_stops) - set(writing.model_stops)
    if strange and writing.model_stops:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(strange))))
        own = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(list(writing.model_stops))))
        notes.append(
            f"answers end with {names}, but the model's generation stops at {own}: add the id to "
            "eos_token_id in generation_config.json"
        )
    if train.extra_sequences:
        notes.append(
            f"the chat template rewrites earlier answers: {train.rows} conversations became "
            f"{train.sequences} sequences, so that each answer is trained as it is given"
        )
    if train.joined:
        notes.append(
            f"in {train.joined} of {train.turns} answers the tokenizer joins the end of the prompt "
            "with the "
            "start of the answer; that token is not trained"
        )
    if "strftime_now" in str(tokenizer.chat_template):
        notes.append("the chat template writes today's date: tokens made on another day differ")
    if not ledger.heldout.written:
        notes.append("no row is held out: nothing can be evaluated")
    return notes


def _facts(output: Path, ledger: Ledger, tokenizer: Any, config: DataConfig) -> dict[str, Any]:
    return {
        "rows": ledger.train.written,
        "heldout_rows": ledger.heldout.written,
        "tokens": ledger.train.tokens,
        "trained_tokens": ledger.train.trained_tokens,
        "longest_row": ledger.train.lengths["max"],
        "max_length": config.max_length,
        "stop_token": ledger.stop_token,
        "template_sha256": template_sha256(tokenizer),
        "digests": {f"{s}.jsonl": digests.of_file(output / f"{s}.jsonl") for s in SIDES},
    }
