"""The ledger: what became of every row. Nothing is dropped or cut without standing here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import DataError

EXAMPLES = 5
"""Rows that an error or the ledger shows of each kind."""


def counted(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass
class SourceCounts:
    """One source. ``rows = invalid + held_out + overlap + left_out + used``."""

    name: str
    role: str
    """``train`` or ``heldout``."""
    format: str = ""
    rows: int = 0
    invalid: int = 0
    duplicates: int = 0
    """Rows that equal an earlier row of the source; they are not removed from training."""
    held_out: int = 0
    overlap: int = 0
    """Training rows removed because a held-out source has them."""
    left_out: int = 0
    """Rows that a weight below 1 did not choose."""
    used: int = 0
    """Distinct places in the source that training reads (a weight of 2 trains each twice)."""
    ignored_columns: tuple[str, ...] = ()
    examples: list[str] = field(default_factory=list)
    """The first invalid rows and why."""

    def __str__(self) -> str:
        return (
            f"{self.name}: {counted(self.rows, 'row')}, {self.invalid} invalid, "
            f"{self.held_out} held out, "
            f"{self.overlap} also held out elsewhere, {self.left_out} not chosen by weight"
        )


@dataclass
class SplitCounts:
    """One side after rendering; a *sequence* is a row, or a part of one (see ``render.views``)."""

    rows: int = 0
    sequences: int = 0
    """Tokenized, before any is dropped; copies made by weights are not counted here."""
    extra_sequences: int = 0
    """Sequences beyond rows: the template shows some answers differently once they are history."""
    invalid: int = 0
    """Rows that the chat template itself refuses."""
    too_long: int = 0
    """Dropped because longer than ``model.max_length``."""
    truncated: int = 0
    without_trained: int = 0
    """Dropped because no token was left to train."""
    written: int = 0
    """Sequences in the file, copies included."""
    tokens: int = 0
    trained_tokens: int = 0
    turns: int = 0
    """Trained assistant turns, copies included."""
    stops: int = 0
    """Of these, turns whose stop token is trained."""
    joined: int = 0
    """Turns where one token spans the end of the prompt and the answer; it is not trained."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Percentiles of written lengths in tokens."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Kind of loss -> the first rows, with file and line."""

    def example(self, kind: str, text: str) -> None:
        """Keep ``text`` if few of its kind are kept yet."""
        kept = self.examples.setdefault(kind, [])
        if len(kept) < EXAMPLES:
            kept.append(text)

    def measure(self, lengths: Sequence[int]) -> None:
        """Fill ``lengths`` with nearest-rank percentiles."""
        ranked = sorted(lengths)
        if ranked:
            last = len(ranked) - 1
            shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
            self.lengths = {
                name: int(ranked[round(last * share)]) for name, share in shares.items()
            }

    @property
    def stop_share(self) -> float:
        """Share of trained turns whose stop token is trained; 1 without turns (plain text)."""
        return self.stops / self.turns if self.turns else 1.0


@dataclass
class Ledger:
    """Everything that happened to the rows of one dataset."""

    sources: list[SourceCounts]
    train: SplitCounts = field(default_factory=SplitCounts)
    heldout: SplitCounts = field(default_factory=SplitCounts)
    stop_token: str | None = None
    packed_sequences: int = 0
    packing_efficiency: float = 0.0
    """Share of real tokens when rows are packed into sequences of ``model.max_length``."""
    notes: list[str] = field(default_factory=list)
    """What the user should know."""

    @property
    def offered(self) -> int:
        """Sequences and unreadable rows: what the shares are shares of."""
        sides = (self.train, self.heldout)
        return sum(s.invalid for s in self.sources) + sum(s.sequences + s.invalid for s in sides)

    @property
    def dropped(self) -> dict[str, int]:
        """What was dropped, by reason."""
        sides = (self.train, self.heldout)
        return {
            "unreadable": sum(s.invalid for s in self.sources) + sum(s.invalid for s in sides),
            "too long": sum(s.too_long for s in sides),
            "without a trained token": sum(s.without_trained for s in sides),
        }

    @property
    def truncated(self) -> int:
        """Sequences that were cut."""
        return self.train.truncated + self.heldout.truncated

    def check_budgets(self, max_dropped: float, max_truncated: float) -> None:
        """Stop the run when too much was lost.

        Raises:
            DataError: With the counts by reason, the budget, and rows to look at.
        """
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items() if n)
        kinds = ("unreadable", "too long", "without a trained token")
        self._within(
            "max_dropped", max_dropped, sum(self.dropped.values()), f"dropped ({reasons})", kinds
        )
        self._within("max_truncated", max_truncated, self.truncated, "truncated", ("truncated",))

    def _within(
        self, budget: str, allowed: float, number: int, what: str, kinds: Sequence[str]
    ) -> None:
        share = number / self.offered if self.offered else 0.0
        if share <= allowed:
            return
        verb = "was" if number == 1 else "were"
        lines = "".join(f"\n  {text}" for text in self._examples(kinds))
        raise DataError(
            f"{counted(number, 'row')} of {self.offered} ({share:.2%}) {verb} {what}, "
            f"but data.{budget} allows {allowed:.2%}{lines}",
            f"mend the rows, raise model.max_length, or raise data.{budget} to {share + 0.0001:.4f}"
            if number < self.offered
            else "mend the rows, or raise model.max_length: none is left",
        )

    def _examples(self, kinds: Sequence[str]) -> list[str]:
        from_sources = (
            [e for s in self.sources for e in s.examples] if "unreadable" in kinds else []
        )
        sides = [
            e for s in (self.train, self.heldout) for k in kinds for e in s.examples.get(k, [])
        ]
        return (from_sources + sides)[: 2 * EXAMPLES]

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of the ledger, flat."""
        train, heldout = self.train, self.heldout
        return {
            "rows_in": sum(s.rows for s in self.sources),
            "rows_invalid": self.dropped["unreadable"],
            "rows_duplicate": sum(s.duplicates for s in self.sources),
            "rows_too_long": self.dropped["too long"],
            "rows_without_trained_token": self.dropped["without a trained token"],
            "rows_truncated": self.truncated,
            "rows_train": train.written,
            "rows_heldout": heldout.written,
            "tokens_train": train.tokens,
            "tokens_trained": train.trained_tokens,
            "tokens_heldout": heldout.tokens,
            "stop_token_share": train.stop_share,
            "packing_efficiency": self.packing_efficiency,
            **{f"length_{name}": value for name, value in train.lengths.items()},
        }

    def write(self, folder: Path) -> None:
        """Write ``ledger.json`` and, for people, ``ledger.md``."""
        value: dict[str, Any] = asdict(self)
        for side in ("train", "heldout"):
            value[side]["stop_share"] = getattr(self, side).stop_share
        value |= {"dropped": self.dropped, "truncated": self.truncated, "offered": self.offered}
        (folder / "ledger.json").write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        (folder / "ledger.md").write_text(self.markdown())

    def markdown(self) -> str:
        """The ledger as two tables and its notes."""
        columns = ("rows", "invalid", "duplicates", "held_out", "overlap", "left_out", "used")
        lines = [
            "# Data ledger",
            "",
            _line("source", "format", *(c.replace("_", " ") for c in columns)),
            _line("---", "---", *("--:" for _ in columns)),
        ]
        lines += [_line(s.name, s.format, *(getattr(s, c) for c in columns)) for s in self.sources]
        lines += ["", _line("", "train", "held out"), _line("---", "--:", "--:")]
        lines += [_line(name, a, b) for name, a, b in self._sides()]
        packed = f"{self.packed_sequences} sequences, {self.packing_efficiency:.1%} of their tokens"
        lines += ["", f"Stop token: `{self.stop_token}`. Packed into {packed} are real."]
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(lines) + "\n"

    def _sides(self) -> list[tuple[str, object, object]]:
        names = (
            "rows",
            "sequences",
            "invalid",
            "too_long",
            "truncated",
            "without_trained",
            "written",
            "tokens",
            "trained_tokens",
            "turns",
            "joined",
        )
        rows: list[tuple[str, object, object]] = [
            (n.replace("_", " "), getattr(self.train, n), getattr(self.heldout, n)) for n in names
        ]
        rows.append(
            ("stop token trained", f"{self.train.stop_share:.1%}", f"{self.heldout.stop_share:.1%}")
        )
        rows += [
            (f"length {name}", length, self.heldout.lengths.get(name, ""))
            for name, length in self.train.lengths.items()
        ]
        return rows


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
