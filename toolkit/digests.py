"""sha256 of files and folders; a file that did not change is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.workspace import cache_root, private_folder

_SMALL = 1 << 20  # below a MiB, hashing is quicker than asking the cache


def of_json(value: Any) -> str:
    """sha256 of a JSON value in its canonical form (sorted keys, no spaces)."""
    canonical = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def of_file(path: Path) -> str:
    """sha256 of a file's bytes, remembered by device, inode, size and time of change."""
    stat = path.stat()
    if stat.st_size < _SMALL:
        return _read(path)
    key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    with _cache() as cache:
        row = cache.execute("SELECT sha256 FROM digests WHERE key = ?", (key,)).fetchone()
    if row:
        return str(row[0])
    digest = _read(path)
    with _cache() as cache:
        cache.execute("INSERT OR REPLACE INTO digests VALUES (?, ?)", (key, digest))
    return digest


@contextlib.contextmanager
def _cache() -> Iterator[sqlite3.Connection]:
    """The remembered digests; committed and closed when the block ends without an error."""
    file = private_folder(cache_root()) / "digests.db"
    with contextlib.closing(sqlite3.connect(file, timeout=30)) as cache, cache:
        cache.execute(
            "CREATE TABLE IF NOT EXISTS digests (key TEXT PRIMARY KEY, sha256 TEXT NOT NULL)"
        )
        yield cache


def of_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """``{relative path: {"sha256", "size"}}`` of every file under ``folder``, hidden ones left out, sorted."""
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    return {
        p.relative_to(folder).as_posix(): {"sha256": of_file(p), "size": p.stat().st_size}
        for p in files
    }


def of_path(path: Path) -> str:
    """One digest for a file (its bytes) or a folder (the digests and names of its files)."""
    return of_json(of_folder(path)) if path.is_dir() else of_file(path)


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
