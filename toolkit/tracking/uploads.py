"""Which files of an artifact go to MLflow: those that people look at. Weights stay where they are, linked by a tag."""

from __future__ import annotations

from pathlib import Path

from toolkit.train.watch.window import FOLDER as PROFILES

UPLOADED = frozenset({".png", ".json", ".md"})
UPLOAD_LIMIT = 5 * 1024 * 1024
"""Files of an artifact that go to MLflow: of these kinds, up to so many bytes."""

PROFILE_LIMIT = 200 * 1024 * 1024
"""Likewise of a profile that somebody asked for (``train/watch/profile.py``), of any kind."""

NOT_UPLOADED = frozenset(
    {"tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"}
)


def small_files(folder: Path) -> list[Path]:
    """Files of an artifact that are worth a copy in MLflow: plots, reports, manifests."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size < _limit(path.relative_to(folder))
    )


def _limit(path: Path) -> int:
    """Bytes up to which a file of an artifact is worth a copy."""
    if path.parts[0] == PROFILES:
        return PROFILE_LIMIT
    return UPLOAD_LIMIT if path.suffix in UPLOADED and path.name not in NOT_UPLOADED else 0
