"""Reads an engine's source, without running it, into ``architectures.json``.

Run it when the version of an engine in a lock moves::

    python -m toolkit.preflight.engine_source vllm 0.32.0 SITE_PACKAGES
    python -m toolkit.preflight.engine_source sglang 0.5.23 SITE_PACKAGES
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

TARGET = Path(__file__).with_name("architectures.json")

_VLLM_MODELS = "vllm/model_executor/models"
_SGLANG_MODELS = "sglang/srt/models"
_REGISTRIES = (
    *("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_SEQUENCE_CLASSIFICATION_MODELS"),
    *("_EMBEDDING_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS"),
)
"""Dictionaries of vLLM's registry.py whose models answer requests on their own."""

Key = tuple[str, str]
"""Module and class."""


@dataclass
class _Class:
    bases: list[str]
    values: dict[str, ast.expr]


@dataclass
class Models:
    """The classes of a folder of model files, with what they inherit."""

    folder: Path
    _classes: dict[Key, _Class] = field(default_factory=dict)
    _imports: dict[Key, Key] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in sorted(self.folder.glob("*.py")):
            self._read(file, file.stem)
        for file in sorted(self.folder.glob("*/*.py")):  # a package of models counts as one module
            self._read(file, file.parent.name)

    def _read(self, file: Path, module: str) -> None:
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ClassDef):
                self._classes[module, node.name] = _read_class(node)
            elif isinstance(node, ast.ImportFrom) and node.module:
                source = node.module.rpartition(".")[2]
                for alias in node.names:
                    self._imports[module, alias.asname or alias.name] = (source, alias.name)

    def ancestors(self, key: Key) -> Iterator[Key]:
        """A class and all that it inherits, nearest first."""
        yield key
        known = self._classes.get(key)
        for base in known.bases if known else ():
            here = (key[0], base)
            found = here if here in self._classes else self._imports.get(here, here)
            yield from self.ancestors(found) if found != key else ()

    def inherits(self, key: Key, name: str) -> bool:
        """Whether a class of that name is among the ancestors."""
        return any(found[1] == name for found in self.ancestors(key))

    def value(self, key: Key, name: str) -> ast.expr | None:
        """What a class sets at its top, or inherits."""
        for found in self.ancestors(key):
            if (known := self._classes.get(found)) and name in known.values:
                return known.values[name]
        return None

    @cached_property
    def entry_classes(self) -> list[str]:
        """Names in ``EntryClass`` at the end of SGLang's model files."""
        names: list[str] = []
        for file in sorted(self.folder.glob("*.py")):
            for node in ast.parse(file.read_bytes()).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EntryClass":
                    names += [n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)]
        return sorted(set(names))


def _read_class(node: ast.ClassDef) -> _Class:
    values: dict[str, ast.expr] = {}
    for part in node.body:
        if isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name):
            values[part.targets[0].id] = part.value
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.value:
            values[part.target.id] = part.value
        elif isinstance(part, ast.FunctionDef):
            values[part.name] = ast.Constant(True)
    return _Class([ast.unparse(base).rpartition(".")[2] for base in node.bases], values)


def vllm(site: Path) -> dict[str, list[str]]:
    """Architectures, and which of them take LoRA, on embeddings, and on the vision tower."""
    models = Models(site / _VLLM_MODELS)
    known = dict(_registered((site / _VLLM_MODELS / "registry.py").read_text()))

    def having(test: str) -> list[str]:
        return sorted(name for name, key in known.items() if _has(models, key, test))

    return {
        "architectures": sorted(known),
        "lora": having("lora"),
        "embeddings": having("embeddings"),
        "tower": having("tower"),
        "methods": _methods(site / "vllm/model_executor/layers/quantization/__init__.py"),
    }


def _has(models: Models, key: Key, test: str) -> bool:
    lora = models.inherits(key, "SupportsLoRA")
    if test == "lora":
        return lora
    value = models.value(key, "embedding_modules" if test == "embeddings" else _tower(models))
    return lora and value is not None and ast.unparse(value) not in ("{}", "False")


def _tower(models: Models) -> str:
    """What a model with LoRA on its vision tower has: a flag, and before vLLM 0.32 a method."""
    flag = "supports_tower_connector_lora"
    has_flag = models.value(("interfaces", "SupportsMultiModal"), flag) is not None
    return flag if has_flag else "get_num_mm_encoder_tokens"


def _registered(text: str) -> Iterator[tuple[str, Key]]:
    for node in ast.parse(text).body:
        named = _assigned(node)
        if named and named[0] in _REGISTRIES and isinstance(named[1], ast.Dict):
            yield from _plain_entries(named[1])


def _plain_entries(registry: ast.Dict) -> Iterator[tuple[str, Key]]:
    """What is written out; entries computed when vLLM is imported cannot be read here."""
    for name, value in zip(registry.keys, registry.values, strict=True):
        if isinstance(name, ast.Constant) and isinstance(value, ast.Tuple):
            module, kind = (ast.literal_eval(part) for part in value.elts)
            yield str(name.value), (str(module), str(kind))


def sglang(site: Path) -> dict[str, list[str]]:
    """Architectures; SGLang wraps linear layers of any of them."""
    return {
        "architectures": Models(site / _SGLANG_MODELS).entry_classes,
        "methods": _methods(site / "sglang/srt/layers/quantization/__init__.py"),
    }


def _methods(file: Path) -> list[str]:
    """Names of quantization methods: vLLM's Literal, the keys of SGLang's dictionary."""
    found: set[str] = set()
    for node in ast.parse(file.read_bytes()).body:
        named = _assigned(node)
        if named is None or named[0] not in ("QuantizationMethods", "BASE_QUANTIZATION_METHODS"):
            continue
        value = named[1]
        parts = [k for k in value.keys if k] if isinstance(value, ast.Dict) else [value]
        found |= {str(c.value) for p in parts for c in ast.walk(p) if isinstance(c, ast.Constant)}
    return sorted(found)


def _assigned(node: ast.stmt) -> tuple[str, ast.expr] | None:
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return ast.unparse(node.target), node.value
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]), node.value
    return None


def main(engine: str, version: str, site: str) -> None:
    """Replace one engine's entry in ``architectures.json``."""
    entries = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    entries[f"{engine} {version}"] = {"vllm": vllm, "sglang": sglang}[engine](Path(site))
    TARGET.write_text(json.dumps(entries, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
