"""Name -> ``module:attribute``, imported on access."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

from toolkit.errors import UsageError


def close_match(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'rank'?)"``, or the empty string when nothing known is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


class Registry(Mapping[str, Any]):
    """A table of things that are imported when they are asked for.

    Args:
        what: Singular noun for error messages, e.g. ``"metric"``.
        table: Name -> ``module:attribute``.
    """

    def __init__(self, what: str, table: Mapping[str, str]) -> None:
        self._what = what
        self._table = dict(table)

    def __getitem__(self, name: str) -> Any:
        if name not in self._table:
            known = ", ".join(sorted(self._table))
            raise UsageError(
                f"no {self._what} is named {name!r}{close_match(name, self._table)}",
                f"known: {known}",
            )
        module, _, attribute = self._table[name].partition(":")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)
