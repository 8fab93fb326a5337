"""``reference.json``: what the training side says, inside every folder that can be served. One format, one place.

::

    {"schema": 1, "kind": "base" | "adapter" | "model",
     "digests": {"weights", "template", "tokenizer",       sha256 of this folder's own
                 "base",                                    adapter: of the base it was trained on
                 "made_from"},                              quantized, merged: of what it was made from
     "precision": "fp32", "trained_on": "fp32" | "bf16" | "nf4" | null, "versions": {...},
     "not_scored": null | "why there are no rows",
     "conversations": [{"name", "messages", "tools", "kwargs", "ids": [...]} | {..., "refused": "message"}],
     "rows": [{"name", "ids": [N], "start": s,        ids from s on are one token over and over, see below
               "logprobs": [N-s],        of the folder's model (adapter: of base and adapter together)
               "beside": [N-s] | null,   of what it stands beside. Adapter: the base alone;
                                         merged: base and adapter; quantized: the full model
               "top": [[[id, logprob], ...]],         the most likely tokens, by position
               "beside_top": [...] | null,            the same of what it stands beside
               "faults": {"rsLoRA ignored": [N-s]}}]} of base and adapter with a known mistake

A row ends with one token several times over: that is the one text that every engine can be made to write, whatever
the weights say (``allowed_token_ids``), so that all models are compared on the same tokens at the price of one answer.
Logprobs are natural, of each id after those before it, rounded to 5 places. N tokens of a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from toolkit.errors import ArtifactError

FILE = "reference.json"
SCHEMA = 1
PLACES = 5

Kind = Literal["base", "adapter", "model"]
Logprobs = tuple[float, ...]


@dataclass(frozen=True)
class StoredConversation:
    """A conversation and the ids of the training path, or why its template refuses it."""

    name: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class StoredRow:
    """Tokens and what the training-side forward says of them; see the module's text."""

    name: str
    ids: tuple[int, ...]
    start: int
    logprobs: Logprobs
    top: tuple[Mapping[int, float], ...] = ()
    beside: Logprobs | None = None
    faults: Mapping[str, Logprobs] = field(default_factory=dict)
    beside_top: tuple[Mapping[int, float], ...] | None = None

    @property
    def places(self) -> range:
        """Positions that are scored."""
        return range(self.start, len(self.ids))


@dataclass(frozen=True)
class Reference:
    """What a folder's ``reference.json`` holds."""

    kind: Kind
    digests: Mapping[str, str | None]
    conversations: tuple[StoredConversation, ...]
    rows: tuple[StoredRow, ...]
    precision: str
    trained_on: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    not_scored: str | None = None

    def write(self, folder: Path) -> None:
        """Write ``reference.json`` into ``folder``; one conversation or row per line."""
        head = {"schema": SCHEMA, **asdict(self)}
        parts = {key: head.pop(key) for key in ("conversations", "rows")}
        parts["rows"] = [row | _pairs(row) for row in parts["rows"]]
        lines = [f"{json.dumps(key)}: {_json(value)}" for key, value in head.items()]
        lines += [f"{json.dumps(key)}: {_list(value)}" for key, value in parts.items()]
        text = ",\n ".join(lines)
        (folder / FILE).write_text(f"{{{text}}}\n", encoding="utf-8")


def read(folder: Path) -> Reference | None:
    """The reference of a folder; None where it brings none.

    Raises:
        ArtifactError: The file is there, but is not one or of a newer format.
    """
    path = folder / FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}", "export the folder again") from error
    if value.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{path} has format {value.get('schema')!r}, and this toolkit reads {SCHEMA}",
            "export the folder again with this version",
        )
    try:
        return _read(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: {error!r}", "export the folder again") from error


def _read(value: Mapping[str, Any]) -> Reference:
    return Reference(
        kind=value["kind"],
        digests=value["digests"],
        conversations=tuple(_conversation(c) for c in value["conversations"]),
        rows=tuple(_row(r) for r in value["rows"]),
        precision=value["precision"],
        trained_on=value["trained_on"],
        versions=value["versions"],
        not_scored=value["not_scored"],
    )


def _conversation(value: Mapping[str, Any]) -> StoredConversation:
    lists = {key: tuple(value[key]) for key in ("messages", "tools", "ids")}
    return StoredConversation(**{**value, **lists})


def _row(value: Mapping[str, Any]) -> StoredRow:
    return StoredRow(
        name=value["name"],
        ids=tuple(value["ids"]),
        start=value["start"],
        logprobs=tuple(value["logprobs"]),
        top=_top(value["top"]),
        beside=None if value["beside"] is None else tuple(value["beside"]),
        faults={name: tuple(values) for name, values in value["faults"].items()},
        beside_top=_top(value["beside_top"]) if value["beside_top"] else None,
    )


def _top(places: list[list[tuple[int, float]]]) -> tuple[Mapping[int, float], ...]:
    return tuple(dict(place) for place in places)


def _pairs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Dictionaries by id as lists of pairs: a key of JSON is a text."""
    found = {key: row[key] for key in ("top", "beside_top")}
    return {k: v and [list(place.items()) for place in v] for k, v in found.items()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _list(entries: list[Any]) -> str:
    """One entry per line."""
    return "[\n  " + ",\n  ".join(map(_json, entries)) + "\n ]" if entries else "[]"
