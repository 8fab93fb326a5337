"""Held-out rows: what is asked, and what should come back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.data.render import prompt_messages, reference
from toolkit.errors import ArtifactError


@dataclass(frozen=True)
class HeldoutRow:
    """One row of ``heldout.jsonl``.

    Attributes:
        index: Its line, which is also its place in the token store.
        id: Content hash.
        data: The row as it stands in the file.
        prompt: Messages before the last answer; empty for plain text.
        reference: The last answer (tool calls as JSON where it is nothing else), or None when the
            row does not end with an assistant turn.
    """

    index: int
    id: str
    data: Mapping[str, Any]
    prompt: tuple[Mapping[str, Any], ...]
    reference: str | None

    @property
    def tools(self) -> list[Any] | None:
        """Tool definitions that the template renders, if the row has any."""
        return self.data.get("tools")


def read_rows(file: Path) -> list[HeldoutRow]:
    """All rows of a ``.jsonl`` of a dataset artifact, in the order of the file.

    Raises:
        ArtifactError: The file does not exist.
    """
    if not file.is_file():
        raise ArtifactError(f"the dataset has no {file.name}: {file} does not exist")
    with file.open(encoding="utf-8") as lines:
        return [_row(index, json.loads(line)) for index, line in enumerate(lines)]


def choose(rows: Iterable[HeldoutRow], limit: int) -> list[HeldoutRow]:
    """At most ``limit`` rows, the same for every model: those with the smallest content hash."""
    return sorted(rows, key=lambda row: row.id)[:limit]


def _row(index: int, data: Mapping[str, Any]) -> HeldoutRow:
    messages = data.get("messages")
    if not messages or messages[-1]["role"] != "assistant":
        return HeldoutRow(index, data["id"], data, (), None)
    return HeldoutRow(index, data["id"], data, tuple(prompt_messages(data)), reference(data))
