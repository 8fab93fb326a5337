"""Everything that is chosen by chance is chosen by content hash: stable under reordering, equal for
equal rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

SHOWN = 16
"""Hex digits of a row's id."""


def content_id(body: Mapping[str, Any]) -> str:
    """First 16 hex digits of the sha256 of the body as canonical JSON (sorted keys, UTF-8, no
    spaces)."""
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:SHOWN]


def chance(row_id: str, purpose: str, seed: int) -> float:
    """A number in [0, 1) that depends on row, purpose and seed alone."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{row_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


def copies(row_id: str, weight: float, seed: int) -> int:
    """How often a row of a source with ``weight`` is used: 1.5 gives every row once and half of
    them twice."""
    whole = math.floor(weight)
    return whole + (chance(row_id, "weight", seed) < weight - whole)


def heldout_ids(row_ids: Iterable[str], fraction: float, seed: int) -> set[str]:
    """The ids that are held out: about ``fraction`` of the distinct ones, at least one, never all.

    A row's place does not depend on the other rows, so that adding data moves no row from one side
    to the other (but for the one row that "at least one" and "never all" may ask for).
    """
    ranked = sorted(set(row_ids), key=lambda i: (chance(i, "heldout", seed), i))
    if fraction == 0 or len(ranked) < 2:
        return set()
    below = sum(chance(i, "heldout", seed) < fraction for i in ranked)
    return set(ranked[: min(max(below, 1), len(ranked) - 1)])


def keep_most(row_ids: Collection[str], limit: int | None, seed: int) -> set[str]:
    """At most ``limit`` of the ids, the first by hash: raising the limit only adds rows."""
    ranked = sorted(set(row_ids), key=lambda i: (chance(i, "heldout", seed), i))
    return set(ranked[:limit])
