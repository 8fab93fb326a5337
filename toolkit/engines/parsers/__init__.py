"""What the engines' own parsers accept, by version: flags with their choices, and known architectures.

The JSON files are written by ``tests/in_engine/parser_of.py`` from each engine's real parser; tests compare them with
it where the engine is installed. Reading one takes milliseconds: a wrong flag is refused before an engine starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from toolkit.registry import close_match

VALUES: Mapping[Any, tuple[int, int | None]] = {
    None: (1, 1),
    0: (0, 0),
    "?": (0, 1),
    "*": (0, None),
    "+": (1, None),
}
"""``nargs`` -> fewest and most values."""


@dataclass(frozen=True)
class CommandLine:
    """What one version of an engine accepts.

    Attributes:
        engine: ``vllm`` or ``sglang``.
        version: Such as ``0.32.0``.
        flags: Long flag -> ``nargs``, ``type`` (``int``, ``float``, ``tokens``) and ``choices``, where it has them.
        architectures: Names that ``config.json`` may have under ``architectures``.
    """

    engine: str
    version: str
    flags: Mapping[str, Mapping[str, Any]]
    architectures: frozenset[str]

    def problems(self, argv: Sequence[str]) -> Iterator[str]:
        """What the engine's parser would complain about, a line each."""
        for flag, values in _split(argv):
            name = self._known(flag)
            if name is None:
                known = [known for known in self.flags if known.startswith("--")]
                yield f"{self.engine} {self.version} has no {flag}{close_match(flag, known)}"
            elif name in self.flags:
                yield from _misused(flag, values, self.flags[name])

    def choices(self, flag: str) -> tuple[str, ...]:
        """Values that a flag may have; empty where anything goes."""
        return tuple(self.flags.get(flag, {}).get("choices", ()))

    def _known(self, flag: str) -> str | None:
        """The flag as the parser has it. A dotted flag sets a member of a JSON value; a short one is not looked at."""
        if not flag.startswith("--"):
            return flag
        name = flag if flag in self.flags else flag.replace("_", "-").partition(".")[0]
        if name in self.flags:
            return name if "." not in flag else ""
        longer = [known for known in self.flags if known.startswith(name)]
        return longer[0] if len(longer) == 1 else None


def _split(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with its values."""
    flag: str | None = None
    values: list[str] = []
    for text in argv:
        if text.startswith("-") and not _is_number(text):
            if flag is not None:
                yield flag, values
            flag, equals, value = text.partition("=")
            values = [value] if equals else []
        else:
            values.append(text)
    if flag is not None:
        yield flag, values


def _misused(flag: str, values: list[str], row: Mapping[str, Any]) -> Iterator[str]:
    fewest, most = VALUES[row.get("nargs")]
    if len(values) < fewest:
        yield f"{flag} needs a value"
    elif most is not None and len(values) > most:
        yield f"{flag} takes {most or 'no'} value{'s' if most != 1 else ''}, not {' '.join(values)}"
    for value in values:
        if row.get("choices") and value not in row["choices"]:
            near = close_match(value, row["choices"])
            yield f"{flag} may not be {value!r}{near}; it may be {', '.join(row['choices'])}"
        elif row.get("type") in ("int", "float") and not _is_number(value):
            yield f"{flag} needs a number, not {value!r}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@cache
def command_line(engine: str, version: tuple[int, ...] = ()) -> CommandLine:
    """What an engine accepts, in the newest known version that is not newer than ``version``.

    Args:
        engine: ``vllm`` or ``sglang``.
        version: Such as ``(0, 32, 0)``; the newest known unless given.
    """
    versions = known_versions(engine)
    fitting = [known for known in versions if known <= version] if version else versions
    chosen = ".".join(map(str, (fitting or versions[:1])[-1]))
    found = json.loads(resources.files(__name__).joinpath(f"{engine}-{chosen}.json").read_text())
    return CommandLine(engine, chosen, found["flags"], frozenset(found["architectures"]))


def known_versions(engine: str) -> list[tuple[int, ...]]:
    """Versions that there is a file of, oldest first."""
    names = (entry.name for entry in resources.files(__name__).iterdir())
    texts = (
        name.removeprefix(f"{engine}-").removesuffix(".json")
        for name in names
        if name.startswith(f"{engine}-")
    )
    return sorted(tuple(map(int, text.split("."))) for text in texts)
