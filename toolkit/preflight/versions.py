"""Versions of engines as numbers that compare."""

from __future__ import annotations

Version = tuple[int, ...]

FOREVER: Version = (9999,)


def parse_version(text: str) -> Version:
    """``"0.32.0+cpu"`` -> ``(0, 32, 0)``."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def show(version: Version) -> str:
    """``(0, 32, 0)`` -> ``"0.32.0"``."""
    return ".".join(map(str, version))


def span(since: Version, until: Version) -> str:
    """As people say it: ``from 0.32``, ``before 0.32``, ``all``."""
    parts = [f"from {show(since)}"] if since else []
    parts += [f"before {show(until)}"] if until != FOREVER else []
    return " ".join(parts) or "all"
