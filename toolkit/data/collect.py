"""From sources to rows: recognised, normalised, counted, split into trained and held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.data.formats import Body, RowError, ignored_columns, read_row, recognise
from toolkit.data.ledger import EXAMPLES, SourceCounts, counted
from toolkit.data.preference import formats_of
from toolkit.data.sources import RawRow, read_source, source_name
from toolkit.data.split import content_id, copies, heldout_ids, keep_most
from toolkit.errors import DataError
from toolkit.recipe.data import DataSection, DataSource
from toolkit.recipe.objectives import Objective

Progress = Callable[[int, str], None]
"""Called with the number of rows so far and the source's name."""


@dataclass(frozen=True, slots=True)
class Row:
    """A normalised row. ``copies`` is how often training uses it."""

    id: str
    body: Body
    where: str
    copies: int = 1


@dataclass
class Collected:
    """All rows of a recipe, on their sides."""

    train: list[Row] = field(default_factory=list)
    heldout: list[Row] = field(default_factory=list)
    sources: list[SourceCounts] = field(default_factory=list)


def collect(
    data: DataSection,
    folder: Path,
    seed: int,
    progress: Progress = lambda _n, _s: None,
    objective: Objective = "sft",
) -> Collected:
    """Read every source and split the rows.

    Equal rows never stand on both sides: a row that is held out anywhere is not trained anywhere.
    Duplicates inside a source stay in training (someone may have repeated a row on purpose) and are
    counted; held-out rows are distinct.

    Raises:
        DataError: A source cannot be read, ``on_invalid`` is ``refuse`` and a row is invalid, or no
            row is left.
    """
    reading = _Reading(data.on_invalid == "drop", folder, progress, objective)
    train = [(source, reading.read(source, heldout=False)) for source in data.sources]
    apart = [(source, reading.read(source, heldout=True)) for source in data.heldout.sources]
    reading.refuse()
    if apart:
        held = {row.id for _, rows in apart for row in rows}
        candidates = [r for s, rows in apart for r in rows if copies(r.id, min(s.weight, 1), seed)]
        candidates = [row for row in candidates if _is_reference(row)]
    else:
        every = [row for _, rows in train for row in rows if _is_reference(row)]
        # Rows above max_rows go back to training: only what is scored is kept from it.
        chosen = heldout_ids((row.id for row in every), data.heldout.fraction, seed)
        held = keep_most(chosen, data.heldout.max_rows, seed)
        candidates = [row for row in every if row.id in held]
    found = Collected(
        heldout=_distinct(candidates, data.heldout.max_rows, seed), sources=reading.counts
    )
    for (source, rows), counts in zip(train, reading.counts, strict=False):
        found.train += _trained(rows, held, source, seed, counts, overlap=bool(apart))
    if not found.train:
        raise DataError(
            "no row is left to train on: " + "; ".join(map(str, found.sources)),
            "check `weight`, and that held-out sources differ from the training sources",
        )
    return found


def _is_reference(row: Row) -> bool:
    """Whether a model may be compared with the row's answer: not where it is labelled a bad one."""
    return bool(row.body.get("label", True))


def _distinct(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """The first row of each id, at most ``limit`` of them by hash, in the order of the sources."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.id, row)
    kept = keep_most(first, limit, seed)
    return [row for row in first.values() if row.id in kept]


def _trained(
    rows: list[Row],
    held: set[str],
    source: DataSource,
    seed: int,
    counts: SourceCounts,
    *,
    overlap: bool,
) -> Iterator[Row]:
    for row in rows:
        if row.id in held:
            counts.overlap += overlap
            counts.held_out += not overlap
        elif times := copies(row.id, source.weight, seed):
            counts.used += 1
            yield Row(row.id, row.body, row.where, times)
        else:
            counts.left_out += 1


class _Reading:
    """Reads sources in turn; invalid rows are counted, the first are kept as examples."""

    def __init__(self, drop: bool, folder: Path, progress: Progress, objective: Objective) -> None:
        self.counts: list[SourceCounts] = []
        self._drop = drop
        self._folder = folder
        self._progress = progress
        self._objective = objective
        self._rows = 0

    def read(self, source: DataSource, *, heldout: bool) -> list[Row]:
        """All valid rows of a source; its counts are appended to ``counts``."""
        counts = SourceCounts(source_name(source), role="heldout" if heldout else "train")
        self.counts.append(counts)
        rows: list[Row] = []
        seen: Counter[str] = Counter()
        for raw in read_source(source, self._folder):
            counts.rows += 1
            self._rows += 1
            if self._rows % 1000 == 0:
                self._progress(self._rows, counts.name)
            try:
                row = self._row(raw, source, counts)
            except RowError as error:
                counts.invalid += 1
                if len(counts.examples) < EXAMPLES:
                    counts.examples.append(
                        f"{raw.where}: {error.message}" + (f" ({error.hint})" if error.hint else "")
                    )
                continue
            seen[row.id] += 1
            rows.append(row)
        if not counts.rows:
            raise DataError(f"{counts.name} has no rows", "give a source with rows, or remove it")
        counts.duplicates = sum(n - 1 for n in seen.values())
        if heldout:
            counts.held_out = len(rows)
        return rows

    def _row(self, raw: RawRow, source: DataSource, counts: SourceCounts) -> Row:
        values = _values(raw)
        formats = formats_of(self._objective, heldout=counts.role == "heldout")
        if not counts.format:
            counts.format = (
                recognise(values, raw.where, formats) if source.format == "auto" else source.format
            )
            counts.ignored_columns = ignored_columns(values, counts.format, formats)
        body = read_row(values, counts.format, formats)
        return Row(content_id(body), body, raw.where)

    def refuse(self) -> None:
        """Raise when rows were invalid and the recipe does not drop them."""
        invalid = sum(c.invalid for c in self.counts)
        if invalid and not self._drop:
            examples = [e for c in self.counts for e in c.examples][:EXAMPLES]
            total = sum(c.rows for c in self.counts)
            raise DataError(
                f"{counted(invalid, 'row')} of {total} cannot be read:\n  " + "\n  ".join(examples),
                "mend the rows, or set data.on_invalid: drop (data.max_dropped bounds how many)",
            )


def _values(raw: RawRow) -> Mapping[str, Any]:
    if raw.values is None:
        raise RowError(raw.problem or "unreadable")
    values: Mapping[str, Any] = raw.values
    return values
