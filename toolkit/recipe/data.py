"""``data:`` which rows train the model and which are held out."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from toolkit.recipe.base import Count, Fraction, Section
from toolkit.recipe.model import Revision
from toolkit.recipe.paths import file_of

Format = Literal[
    "auto",
    "messages",
    "prompt_completion",
    "alpaca",
    "sharegpt",
    "text",
    "preference",
    "labelled",
    "prompt",
]
Policy = Literal["drop", "refuse"]


class DataSource(Section):
    """One set of rows: a file, a Hub dataset, or a Python function that yields rows."""

    path: str | None = None
    """A `.jsonl`, `.json`, `.csv` or `.parquet` file, relative to the recipe."""
    hub: str | None = None
    """A Hub dataset id `org/name`."""
    revision: Revision | None = None
    """Commit of the Hub dataset, 40 hex digits; required with `hub`."""
    subset: str | None = None
    """Configuration name of the Hub dataset."""
    split: str = "train"
    """Split of the Hub dataset."""
    python: str | None = None
    """`file.py:function`, relative to the recipe; called with `arguments`, yields row dicts."""
    arguments: dict[str, Any] = {}
    """Keyword arguments for the `python` function."""
    format: Format = "auto"
    """Row format; `auto` recognises it by the columns of the first row, among those that `train.objective` reads."""
    columns: dict[str, str] = {}
    """Rename columns before the format is read: `{theirs: ours}`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is used: 2 takes every row twice, 0.5 takes half of them, chosen by content hash."""

    @property
    def file(self) -> str | None:
        """The local file that is read, as the recipe writes it; None for a Hub dataset."""
        return self.path or (file_of(self.python) if self.python else None)

    @model_validator(mode="after")
    def _exactly_one_place(self) -> Self:
        given = [key for key in ("path", "hub", "python") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of path, hub, python (given: {', '.join(given) or 'none'})"
            )
        if self.hub is not None and self.revision is None:
            raise ValueError(
                f"revision is missing: pin the dataset {self.hub!r} to a commit of 40 hex digits"
            )
        if self.python is not None and ":" not in self.python:
            raise ValueError(f"python is {self.python!r}: write 'file.py:function'")
        if self.hub is None and (self.revision or self.subset):
            raise ValueError("revision and subset are those of a Hub dataset: they need hub")
        if self.python is None and self.arguments:
            raise ValueError("arguments are those of a function: they need python")
        return self


class HeldoutSection(Section):
    """Rows that training never sees: either a share of the sources, or sources of their own."""

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the training rows that is held out, chosen by content hash, so equal rows never stand on both sides."""
    sources: tuple[DataSource, ...] = ()
    """Sources that are held out as a whole; `fraction` is then not used."""
    max_rows: Count | None = None
    """Keep at most this many held-out rows, chosen by content hash."""


class DataSection(Section):
    """Training data, what happens to rows that do not fit, and the budgets that stop a run."""

    sources: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    """Where rows come from; several are mixed by their weights."""
    heldout: HeldoutSection = HeldoutSection()
    """Rows that training never sees; evaluation uses them."""
    on_invalid: Policy = "refuse"
    """A row that cannot be read as its format: `drop` counts it, `refuse` stops the run."""
    on_too_long: Literal["drop", "truncate", "refuse"] = "drop"
    """A row longer than `model.max_length` tokens."""
    max_dropped: Fraction = 0.05
    """Budget: largest share of rows that may be dropped before the run stops."""
    max_truncated: Fraction = 0.05
    """Budget: largest share of rows that may be truncated before the run stops."""
    system: str | None = None
    """System prompt for conversations that bring none; in training, evaluation and calibration alike."""
