"""Which files of an artifact go to MLflow: those that people look at. Weights stay where they are, linked by a tag."""

from __future__ import annotations

from pathlib import Path

UPLOADED = frozenset({".png", ".json", ".md"})
UPLOAD_LIMIT = 5 * 1024 * 1024
"""Files of an artifact that go to MLflow: of these kinds, up to so many bytes."""

NOT_UPLOADED = frozenset(
    {"tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"}
)


def small_files(folder: Path) -> list[Path]:
    """Files of an artifact that are worth a copy in MLflow: plots, reports, manifests."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in UPLOADED
        and path.name not in NOT_UPLOADED
        and path.is_file()
        and path.stat().st_size < UPLOAD_LIMIT
    )
