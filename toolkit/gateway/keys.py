"""API keys: shown once when they are made, kept as hashes, gone from a running front within a second of being revoked.

A key is ``toolkit_<id>_<secret><checksum>``. The prefix and the checksum let secret scanners find a leaked key without
false alarms and let a mistyped one be refused without a look-up; the id is public and stands in logs.

The secret is 256 random bits. Slow hashes (bcrypt, argon2) defend passwords that people choose, which can be guessed;
2**256 cannot, however fast the hash is, and a slow one would only hand an attacker a way to burn the front's CPU.
So the file holds HMAC-SHA256 of each key, with a random pepper of the file, so that hashes of two workspaces cannot be
compared. The file is 0600; writers take a lock and replace it whole.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
import re
import secrets
import string
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError, UsageError
from toolkit.workspace import private_folder

PREFIX = "toolkit_"
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
ID_DIGITS, SECRET_DIGITS, CHECK_DIGITS = (
    10,
    43,
    6,
)  # 43 base-62 digits hold 256 bits, 6 hold a CRC-32
SHAPE = re.compile(
    rf"{PREFIX}([0-9A-Za-z]{{{ID_DIGITS}}})_[0-9A-Za-z]{{{SECRET_DIGITS + CHECK_DIGITS}}}"
)
METRICS = "/metrics"
"""In a key's models: it may read the metrics of everyone. Keys that open all models may do that too."""
RESERVED_CLASSES = ("none", "jwt")
"""Key classes in metrics that are not those of an API key."""
NO_DIGEST = "0" * 64
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True)
class Key:
    """What is known of a key; times are seconds since 1970.

    Attributes:
        digest: HMAC-SHA256 of the whole key.
        models: Public model names it may ask; ``None`` is all. :data:`METRICS` is no model, but the metrics.
        key_class: Label in metrics, for keys that belong together: ``batch``, ``partners``.
    """

    id: str
    name: str
    digest: str
    tenant: str
    created_at: float
    models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    key_class: str = "key"
    expires_at: float | None = None
    revoked_at: float | None = None

    def state(self, now: float) -> str:
        """``active``, ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else "active"

    def public(self, now: float) -> dict[str, Any]:
        """All but the digest."""
        shown = asdict(self)
        del shown["digest"]
        return shown | {"state": self.state(now)}


@dataclass
class Keys:
    """The content of a key file."""

    pepper: str = field(default_factory=lambda: secrets.token_hex(32))
    keys: dict[str, Key] = field(default_factory=dict)
    """By id."""

    def digest(self, text: str) -> str:
        """What is kept of a key."""
        return hmac.digest(bytes.fromhex(self.pepper), text.encode(), "sha256").hex()

    def match(self, presented: str) -> Key | None:
        """The key that was shown, living or dead. The comparison takes the same time for any secret."""
        shape = SHAPE.fullmatch(presented)
        if shape is None or not hmac.compare_digest(
            _checksum(presented), presented[-CHECK_DIGITS:]
        ):
            return None
        key = self.keys.get(shape[1])
        same = hmac.compare_digest(self.digest(presented), key.digest if key else NO_DIGEST)
        return key if same else None

    def create(self, name: str, **fields: Any) -> tuple[Key, str]:
        """Add a key; returns it and its text, which is kept nowhere.

        Raises:
            UsageError: A living key has that name, or the class is reserved.
        """
        now = time.time()
        if any(k.name == name and k.state(now) == "active" for k in self.keys.values()):
            raise UsageError(
                f"a living key is named {name!r} already",
                f"toolkit keys rotate {name}, or choose another name",
            )
        if fields.get("key_class") in RESERVED_CLASSES:
            raise UsageError(
                f"class {fields['key_class']!r} is reserved", "choose a name such as batch"
            )
        key_id, text = _new_key(self.keys)
        fields = {"tenant": name} | {k: v for k, v in fields.items() if v is not None}
        key = Key(id=key_id, name=name, digest=self.digest(text), created_at=now, **fields)
        self.keys[key_id] = key
        return key, text

    def revoke(self, named: str) -> Key:
        """Revoke the living key of that name or id.

        Raises:
            UsageError: There is none.
        """
        key = replace(self.find(named), revoked_at=time.time())
        self.keys[key.id] = key
        return key

    def rotate(self, named: str, overlap_s: float = 0) -> tuple[Key, str]:
        """A new secret for a key; the old one ends now, or ``overlap_s`` seconds from now.

        Raises:
            UsageError: There is no such living key.
        """
        old, now = self.find(named), time.time()
        if overlap_s > 0:
            end = min(now + overlap_s, old.expires_at or float("inf"))
            self.keys[old.id] = replace(old, name=f"{old.name}.{old.id}", expires_at=end)
        else:
            self.keys[old.id] = replace(old, revoked_at=now)
        key_id, text = _new_key(self.keys)
        lifetime = old.expires_at - old.created_at if old.expires_at else None
        key = replace(
            old,
            id=key_id,
            digest=self.digest(text),
            created_at=now,
            expires_at=now + lifetime if lifetime else None,
        )
        self.keys[key_id] = key
        return key, text

    def find(self, named: str) -> Key:
        """The living key of a name or id.

        Raises:
            UsageError: There is none.
        """
        now = time.time()
        living = [k for k in self.keys.values() if k.state(now) == "active"]
        for key in living:
            if named in (key.name, key.id):
                return key
        raise UsageError(f"no living key is named {named!r}", "toolkit keys list")


def read(path: Path) -> Keys:
    """Read a key file; an absent one holds no keys.

    Raises:
        ToolkitError: Others may read or change it, or it is damaged.
    """
    try:
        with path.open("rb") as file:
            _refuse_if_open_to_others(path, os.fstat(file.fileno()))
            return _decode(path, file.read())
    except FileNotFoundError:
        return Keys()
    except OSError as error:
        raise ToolkitError(f"{path} cannot be read: {error.strerror}") from error


def _refuse_if_open_to_others(path: Path, known: os.stat_result) -> None:
    if known.st_mode & 0o077:
        raise ToolkitError(
            f"{path} is open to others (mode {known.st_mode & 0o777:04o}); keys lie in a file for its owner alone",
            f"chmod 600 {path}, and rotate the keys if others can have written it",
        )
    if known.st_uid not in (0, os.geteuid()):
        raise ToolkitError(
            f"{path} belongs to user {known.st_uid}, and this is user {os.geteuid()}",
            f"chown {os.geteuid()} {path}",
        )


def _decode(path: Path, text: bytes) -> Keys:
    try:
        values = json.loads(text)
        if values["version"] != 1:
            raise ToolkitError(
                f"{path} has version {values['version']}, and this toolkit reads 1",
                "upgrade the toolkit",
            )
        found = [_key(entry) for entry in values["keys"]]
        bytes.fromhex(values["pepper"])
    except (ValueError, KeyError, TypeError) as error:
        raise ToolkitError(
            f"{path} is not a key file: {error!r}", "restore it, or remove it and make new keys"
        ) from error
    return Keys(values["pepper"], {key.id: key for key in found})


def _key(entry: Mapping[str, Any]) -> Key:
    models = entry.get("models")
    return Key(**{**entry, "models": None if models is None else tuple(models)})


@contextmanager
def editing(path: Path) -> Iterator[Keys]:
    """Change a key file: one writer at a time, replaced whole, never half written.

    Raises:
        ToolkitError: Others may read or change it, or it is damaged.
    """
    private_folder(path.parent)
    lock = os.open(
        path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = read(path)
        yield keys
        _write(path, keys)
    finally:
        os.close(lock)


def _write(path: Path, keys: Keys) -> None:
    values = {
        "version": 1,
        "pepper": keys.pepper,
        "keys": [asdict(key) for key in keys.keys.values()],
    }
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def lifetime_s(text: str) -> float:
    """``30d`` -> 2592000. Units: s, m, h, d, w.

    Raises:
        UsageError: It is no such text.
    """
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS_S or not number.isascii() or not number.isdigit() or int(number) < 1:
        raise UsageError(f"{text!r} is not a time", "write 12h, 30d or 8w")
    return float(int(number) * UNITS_S[unit])


def _new_key(taken: Mapping[str, Key]) -> tuple[str, str]:
    while True:
        key_id = "".join(secrets.choice(ALPHABET) for _ in range(ID_DIGITS))
        if key_id not in taken:
            break
    body = f"{PREFIX}{key_id}_{_base62(secrets.randbits(256), SECRET_DIGITS)}"
    return key_id, body + _checksum(body + "." * CHECK_DIGITS)


def _checksum(text: str) -> str:
    """Of all but the last digits, which hold it."""
    return _base62(zlib.crc32(text[:-CHECK_DIGITS].encode()), CHECK_DIGITS)


def _base62(number: int, digits: int) -> str:
    text = ""
    for _ in range(digits):
        number, digit = divmod(number, 62)
        text = ALPHABET[digit] + text
    return text
