"""Work on rows that outlives a crash: one line per finished row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class PartialResults:
    """Results by row id, kept in a file that only grows.

    Args:
        file: Where the lines stand; made with its first row.
        resume: Whether to read what is there; otherwise it is thrown away.
    """

    def __init__(self, file: Path, *, resume: bool) -> None:
        self._file = file
        if not resume:
            file.unlink(missing_ok=True)
        self._rows = self._read()

    def __contains__(self, row: str) -> bool:
        return row in self._rows

    def __getitem__(self, row: str) -> dict[str, Any]:
        return self._rows[row]

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: str, result: Mapping[str, Any]) -> None:
        """Keep one row's result; it is on disk when this returns."""
        self._rows[row] = dict(result)
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"id": row, **result}, ensure_ascii=False) + "\n")

    def _read(self) -> dict[str, dict[str, Any]]:
        """All whole lines; one torn by a crash is cut away from the file, too, so that the next starts cleanly."""
        if not self._file.exists():
            return {}
        text = self._file.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            self._file.write_bytes(whole)
        rows = [json.loads(line) for line in whole.splitlines()]
        return {row.pop("id"): row for row in rows}
