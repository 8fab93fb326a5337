"""Identity of what is served: digests of weights, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path

from toolkit import digests
from toolkit.errors import ArtifactError

TEMPLATE = "chat_template.jinja"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_MEANS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "bias",
    "use_dora",
)
"""Keys of ``adapter_config.json`` that change what the weights do."""


def weights_digest(folder: Path) -> str:
    """sha256 over names and bytes of the safetensors of a model or adapter, and of what scales an adapter.

    The name under which a folder calls its base, or anything else without effect on the answers, does not count.

    Raises:
        ArtifactError: There are no safetensors.
    """
    files = {path.name: digests.of_file(path) for path in sorted(folder.glob("*.safetensors"))}
    if not files:
        raise ArtifactError(f"{folder} has no weights (*.safetensors)")
    return digests.of_json(files | _scaling(folder))


def adapter_version(folder: Path) -> str:
    """The short version of a model or adapter: the first 16 hex digits of :func:`weights_digest`."""
    return weights_digest(folder)[:16]


def folder_digests(folder: Path) -> dict[str, str | None]:
    """``weights``, ``template`` and ``tokenizer`` of a folder; None where it has none."""
    template = folder / TEMPLATE
    tokenizer = next((folder / name for name in TOKENIZER if (folder / name).is_file()), None)
    return {
        "weights": weights_digest(folder),
        "template": digests.of_file(template) if template.is_file() else None,
        "tokenizer": digests.of_file(tokenizer) if tokenizer else None,
    }


def _scaling(folder: Path) -> dict[str, str]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text())
    kept = {key: config.get(key) for key in _MEANS}
    if isinstance(kept["target_modules"], list):
        kept["target_modules"] = sorted(kept["target_modules"])  # PEFT writes a set: any order
    return {"adapter_config": digests.of_json(kept)}
