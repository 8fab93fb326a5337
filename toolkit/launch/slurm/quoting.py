"""The two languages of a batch script: bash, and the `#SBATCH` lines that sbatch reads by its own rules.

Everything that comes from outside goes through one of these functions.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from toolkit.errors import UsageError

_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def word(value: str) -> str:
    r"""One word of bash that stands for exactly ``value``, on one line.

    Control characters become ``$'\r'``: sbatch refuses a script with the line ends of DOS, and a line of a value must
    not look like a line of the script.

    Raises:
        UsageError: It holds NUL, which no argument of any program can, or half of a surrogate pair.
    """
    if "\0" in value:
        raise UsageError(f"{value!r} holds a NUL character, which no program's argument can")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{value!r} is no text that UTF-8 can write") from None
    if not any(ord(c) < 32 or ord(c) == 127 for c in value):
        return shlex.quote(value)
    return "$'" + "".join(_ESCAPES.get(c) or _plain(c) for c in value) + "'"


def _plain(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 32 or code == 127 else character


def words(values: Iterable[str]) -> str:
    """Words of bash with a space between."""
    return " ".join(map(word, values))


def array(name: str, values: Iterable[str]) -> list[str]:
    """Lines that make an array, one value on each."""
    return [f"{name}=(", *(f"  {word(value)}" for value in values), ")"]


def export(name: str, value: str) -> str:
    """A line that sets a variable for the programs below.

    Raises:
        UsageError: bash cannot have a variable of that name.
    """
    return f"export {variable(name)}={word(value)}"


def variable(name: str) -> str:
    """``name`` where bash can have a variable of it.

    Raises:
        UsageError: It cannot.
    """
    if not _VARIABLE.fullmatch(name):
        raise UsageError(f"{name!r} cannot be the name of a variable")
    return name


def directive(option: str, value: str | None = None) -> str:
    """A `#SBATCH` line. sbatch knows both quotes, the backslash before any character, and ``#`` as a comment."""
    if value is None:
        return f"#SBATCH --{option}"
    if re.fullmatch(r"[A-Za-z0-9_.,:;=+@/%^&|*!\[\]-]*", value):
        return f"#SBATCH --{option}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{option}="{escaped}"'
