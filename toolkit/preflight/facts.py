"""What preflight knows besides the recipe. This file and those it calls do all the reading; the rules are pure.

Nothing here imports torch or a model library: configs are JSON, and so is the header of a
safetensors file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from toolkit.preflight.adapter_facts import AdapterFacts, read_adapter
from toolkit.preflight.base_facts import BaseFacts, read_base
from toolkit.preflight.functions import FunctionFacts, read_functions
from toolkit.preflight.gpu import GpuFacts
from toolkit.preflight.reading import read_json
from toolkit.preflight.versions import Version, parse_version, show
from toolkit.recipe import Recipe
from toolkit.recipe.model import SourceKind, parse_source

Accelerator = Literal["cpu", "cuda"]

LOCKED_ENGINES: Mapping[tuple[str, str], str] = {
    ("vllm", "cpu"): "0.32.0",
    ("vllm", "cuda"): "0.32.0",
    ("sglang", "cuda"): "0.5.23",
}
"""Version of each engine in the shipped locks, by engine and accelerator."""


@dataclass(frozen=True)
class Facts:
    """All that rules may look at besides the recipe."""

    recipe_dir: Path
    accelerator: Accelerator = "cpu"
    engine: str = "vllm"
    """The engine that serves; vLLM where the recipe serves nothing."""
    engine_version: Version = ()
    """Of the engine; empty when there is no lock of it for this accelerator."""
    gpu: GpuFacts | None = None
    """``None`` without a GPU, and where nothing says which."""
    base: BaseFacts | None = None
    base_hash: str | None = None
    """Of the base's weights, as an adapter's reference.json names it; ``None`` when not known."""
    source_problem: str | None = None
    """Why a local base cannot be read, if it cannot."""
    template: bool | None = None
    """Whether the base brings a chat template; ``None`` when that is not known yet."""
    adapters: Mapping[str, AdapterFacts] = field(default_factory=dict)
    missing: tuple[tuple[str, str], ...] = ()
    """Files that the recipe names and that are not there: (key, path)."""
    functions: tuple[FunctionFacts, ...] = ()
    dataset: Mapping[str, Any] = field(default_factory=dict)
    """What the data step said of its rows (longest_row, tokens, ...); empty when it has not run."""
    done: frozenset[str] = frozenset()
    """Names of the steps whose artifact is there."""
    ranks: int = 1
    """Processes that train together."""

    @property
    def engine_name(self) -> str:
        """As people name it: ``vllm 0.32.0``."""
        return f"{self.engine} {show(self.engine_version)}".strip()

    @property
    def capability(self) -> float | None:
        """Compute capability of the GPU, where it is known."""
        return self.gpu.capability if self.gpu else None


def gather(
    recipe: Recipe,
    recipe_dir: Path,
    *,
    accelerator: Accelerator = "cpu",
    engine_version: str | None = None,
    base_config: Mapping[str, Any] | None = None,
    base_folder: Path | None = None,
    base_hash: str | None = None,
    gpu: GpuFacts | None = None,
    dataset: Mapping[str, Any] | None = None,
    done: frozenset[str] = frozenset(),
) -> Facts:
    """Read what the rules need: a few small files and headers, no network.

    Args:
        recipe: The recipe.
        recipe_dir: Folder that its relative paths start from.
        accelerator: Where the model will be served.
        engine_version: Of the engine that will run; that of the shipped lock unless given.
        base_config: ``config.json`` of the base; a local folder's own is found without it.
        base_folder: Where a base that was fetched already is; a local folder is found without it.
        base_hash: Of that base, as ``reference.json`` of an adapter names it.
        gpu: The GPU, where it is known.
        dataset: What the data step said of its rows.
        done: Names of the steps whose artifact is there.
    """
    engine = engine_of(recipe, accelerator)
    version = engine_version or LOCKED_ENGINES.get((engine, accelerator), "")
    folder = _local_folder(recipe, recipe_dir)
    problem = _source_problem(recipe, recipe_dir)
    adapters = recipe.serve.adapters if recipe.serve else ()
    return Facts(
        recipe_dir=recipe_dir,
        accelerator=accelerator,
        engine=engine,
        engine_version=parse_version(version),
        gpu=gpu,
        base=None if problem else _base(base_folder or folder, base_config),
        base_hash=base_hash,
        source_problem=problem,
        template=_has_template(folder) if folder is not None and problem is None else None,
        adapters={
            name: read_adapter(_resolve(recipe_dir, path))
            for a in adapters
            for name, path in a.folders.items()
        },
        missing=tuple(_missing(recipe, recipe_dir)),
        functions=tuple(read_functions(recipe, recipe_dir)),
        dataset=dataset or {},
        done=done,
    )


def engine_of(recipe: Recipe, accelerator: Accelerator) -> str:
    """The engine that the recipe names; vLLM where it names none, or leaves the choice to us on a CPU."""
    named = recipe.serve.engine if recipe.serve else "vllm"
    return named if named in ("vllm", "sglang") else "vllm"


def _base(folder: Path | None, config: Mapping[str, Any] | None) -> BaseFacts | None:
    if config is None and folder is not None:
        config = read_json(folder / "config.json")
    if config is None:
        return None
    if folder is None:
        return BaseFacts(config)
    return read_base(folder, config, read_json(folder / "model.safetensors.index.json") or {})


def _resolve(recipe_dir: Path, text: str) -> Path:
    return recipe_dir / Path(text).expanduser()


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
