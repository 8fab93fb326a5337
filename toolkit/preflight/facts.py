"""What preflight knows besides the recipe. This file does all the reading; the rules are pure.

Nothing here imports torch or a model library: configs are JSON, and so is the header of a
safetensors file, after an 8-byte length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from toolkit.preflight.functions import FunctionFacts, read_functions
from toolkit.recipe import Recipe
from toolkit.recipe.model import SourceKind, parse_source

Accelerator = Literal["cpu", "cuda"]

LOCKED_ENGINES: Mapping[tuple[str, str], str] = {
    ("vllm", "cpu"): "0.32.0",
    ("vllm", "cuda"): "0.32.0",
    ("sglang", "cuda"): "0.5.23",
}
"""Version of each engine in the shipped locks, by engine and accelerator."""

_HEADER_LIMIT = 100 * 2**20
"""Bytes; the safetensors format allows no longer header."""


@dataclass(frozen=True)
class BaseFacts:
    """What ``config.json`` of the base says; ``None`` where it does not say."""

    config: Mapping[str, Any]

    @property
    def _text(self) -> Mapping[str, Any]:
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    def number(self, key: str) -> int | None:
        """An integer of the language model's part of the config."""
        value = self._text.get(key)
        return value if isinstance(value, int) else None

    @property
    def positions(self) -> int | None:
        """Longest context in tokens, the factor of YaRN included where it is configured."""
        longest = self.number("max_position_embeddings")
        scaling = self._text.get("rope_scaling") or self._text.get("rope_parameters") or {}
        if longest is None or scaling.get("rope_type", scaling.get("type")) != "yarn":
            return longest
        original = scaling.get("original_max_position_embeddings") or longest
        return max(longest, int(original * scaling.get("factor", 1)))

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """``quantization_config`` of a base that is quantized already."""
        value = self.config.get("quantization_config") or self._text.get("quantization_config")
        return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class AdapterFacts:
    """What the folder of a finished adapter says."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    """Why the folder cannot be read, if it cannot."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of each tensor, from the safetensors header."""
    added_tokens: Mapping[str, Any] = field(default_factory=dict)
    """Token -> id, from added_tokens.json; tokenizers copy those of the base into it."""

    @property
    def rank(self) -> int:
        """The largest rank in the adapter, ``rank_pattern`` included; 0 when it does not say."""
        patterns = self.config.get("rank_pattern") or {}
        return max(int(self.config.get("r") or 0), *map(int, patterns.values()), 0)


@dataclass(frozen=True)
class Facts:
    """All that rules may look at besides the recipe."""

    recipe_dir: Path
    accelerator: Accelerator = "cpu"
    engine_version: tuple[int, ...] = ()
    """Of the recipe's engine; empty when there is no lock of it for this accelerator."""
    base: BaseFacts | None = None
    source_problem: str | None = None
    """Why a local base cannot be read, if it cannot."""
    template: bool | None = None
    """Whether the base brings a chat template; ``None`` when that is not known yet."""
    adapters: Mapping[str, AdapterFacts] = field(default_factory=dict)
    missing: tuple[tuple[str, str], ...] = ()
    """Files that the recipe names and that are not there: (key, path)."""
    functions: tuple[FunctionFacts, ...] = ()


def parse_version(text: str) -> tuple[int, ...]:
    """``"0.32.0+cpu"`` -> ``(0, 32, 0)``."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def gather(
    recipe: Recipe,
    recipe_dir: Path,
    *,
    accelerator: Accelerator = "cpu",
    engine_version: str | None = None,
    base_config: Mapping[str, Any] | None = None,
) -> Facts:
    """Read what the rules need: a few small files, no network.

    Args:
        recipe: The recipe.
        recipe_dir: Folder that its relative paths start from.
        accelerator: Where the model will be served.
        engine_version: Of the engine that will run; that of the shipped lock unless given.
        base_config: ``config.json`` of a base that was fetched already; a local folder's own is
            found without it.
    """
    engine = recipe.serve.engine if recipe.serve else "vllm"
    version = engine_version or LOCKED_ENGINES.get((engine, accelerator), "")
    folder = _local_folder(recipe, recipe_dir)
    problem = _source_problem(recipe, recipe_dir)
    if base_config is None and folder is not None and problem is None:
        base_config = read_json(folder / "config.json")
    adapters = recipe.serve.adapters if recipe.serve else ()
    return Facts(
        recipe_dir=recipe_dir,
        accelerator=accelerator,
        engine_version=parse_version(version),
        base=None if base_config is None else BaseFacts(base_config),
        source_problem=problem,
        template=_has_template(folder) if folder is not None and problem is None else None,
        adapters={a.name: read_adapter(_resolve(recipe_dir, a.path)) for a in adapters},
        missing=tuple(_missing(recipe, recipe_dir)),
        functions=tuple(read_functions(recipe, recipe_dir)),
    )


def read_adapter(folder: Path) -> AdapterFacts:
    """Read ``adapter_config.json`` and the header of ``adapter_model.safetensors``."""
    config = read_json(folder / "adapter_config.json")
    if config is None:
        return AdapterFacts(folder, problem="has no readable adapter_config.json")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        return AdapterFacts(folder, config, problem="has no adapter_model.safetensors")
    shapes = _shapes(weights)
    if shapes is None:
        return AdapterFacts(folder, config, problem="is damaged: its header cannot be read")
    added = read_json(folder / "added_tokens.json") or {}
    return AdapterFacts(folder, config, shapes=shapes, added_tokens=added)


def _resolve(recipe_dir: Path, text: str) -> Path:
    return recipe_dir / Path(text).expanduser()


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; ``None`` when the file is not there or holds something else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _shapes(path: Path) -> dict[str, tuple[int, ...]] | None:
    """Tensor shapes from a safetensors header: 8 bytes little-endian length, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if 0 < length <= _HEADER_LIMIT else b""
    try:
        header = json.loads(raw)
    except ValueError:
        return None
    return {name: tuple(t["shape"]) for name, t in header.items() if name != "__metadata__"}


def _local_folder(recipe: Recipe, recipe_dir: Path) -> Path | None:
    source = parse_source(recipe.model.source)
    return _resolve(recipe_dir, source.location) if source.kind is SourceKind.folder else None


def _source_problem(recipe: Recipe, recipe_dir: Path) -> str | None:
    source = parse_source(recipe.model.source)
    path, shown = _resolve(recipe_dir, source.location), source.location
    if source.kind is SourceKind.gguf and not path.is_file():
        return f"{shown} is not there"
    return _folder_problem(path, shown) if source.kind is SourceKind.folder else None


def _folder_problem(path: Path, shown: str) -> str | None:
    if not path.is_dir():
        return f"{shown} is not a folder"
    if not (path / "config.json").is_file():
        return f"{shown} has no config.json"
    if read_json(path / "config.json") is None:
        return f"{shown}/config.json is not a JSON object"
    if not any(path.glob("*.safetensors")):
        return f"{shown} has no *.safetensors file"
    return None


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return bool((read_json(folder / "tokenizer_config.json") or {}).get("chat_template"))


def _missing(recipe: Recipe, recipe_dir: Path) -> Iterator[tuple[str, str]]:
    named = [("model.chat_template", recipe.model.chat_template)]
    if recipe.data:
        named += [(f"data.sources.{i}.path", s.path) for i, s in enumerate(recipe.data.sources)]
        named += [
            (f"data.heldout.sources.{i}.path", s.path)
            for i, s in enumerate(recipe.data.heldout.sources)
        ]
    for key, text in named:
        if text is not None and not _resolve(recipe_dir, text).is_file():
            yield key, text
