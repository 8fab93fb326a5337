"""A model folder: its files, one chat template in one place, the facts that later steps need."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from toolkit.errors import ModelError

WANTED = (
    "*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.spm", "*.tiktoken",
    "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*", "README.md",
)  # fmt: skip
UNWANTED = (
    "consolidated*",
    "training_args*",
    "trainer_state.json",
    "manifest.json",
    "metrics.jsonl",
)
"""Second copies of the weights, and files that belong to a run and not to a model."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "*.spm", "*.tiktoken", "chat_template*", "generation_config.json", "preprocessor_config.json",
    "*.py",
)  # fmt: skip
"""What a model needs beside config and weights. Python files are here only where they are trusted."""
Progress = Callable[[float, float], None]
"""Called with bytes done and bytes in total."""


def wanted_patterns(*, code: bool) -> list[str]:
    """Files of a model repository worth having; Python files only when ``code`` is trusted."""
    return [*WANTED, *(("*.py",) if code else ())]


def file_sha256(path: Path, progress: Progress | None = None) -> str:
    """Hex sha256 of a file, read in blocks of 4 MiB."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(4 << 20):
            digest.update(block)
            done += len(block)
            if progress:
                progress(done, total)
    return digest.hexdigest()


def take(source: Path, output: Path, *, code: bool, progress: Progress | None = None) -> None:
    """Bring the model files of ``source`` into ``output``.

    Weights become hard links where the disk allows, the rest is copied. Symbolic links are
    followed, so that the result stands alone (a Hub cache is made of them).

    Raises:
        ModelError: ``source`` is no model folder, or its weights are pickled.
    """
    check(source)
    files = [
        path for path in sorted(source.iterdir()) if path.is_file() and _belongs(path.name, code)
    ]
    done, total = 0, sum(path.stat().st_size for path in files)
    for path in files:
        if path.suffix == ".safetensors":
            link_or_copy(path.resolve(), output / path.name)
        else:
            shutil.copyfile(path, output / path.name)
        done += path.stat().st_size
        if progress:
            progress(done, total)


def _belongs(name: str, code: bool) -> bool:
    if any(fnmatch(name, pattern) for pattern in UNWANTED):
        return False
    return any(fnmatch(name, pattern) for pattern in wanted_patterns(code=code))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a large file a second name where the file system can, else copy it."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the files of :data:`COMPANIONS` that ``source`` has, byte for byte; return their names, sorted.

    Bytes, not a tokenizer loaded and saved again: the template that is served must be the one that
    was trained with.
    """
    names = sorted(path.name for path in source.iterdir() if path.is_file())
    found = [name for name in names if any(fnmatch(name, pattern) for pattern in COMPANIONS)]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def check(folder: Path) -> None:
    """Refuse a folder that is not a model with safetensors and a tokenizer.

    Raises:
        ModelError: Something is missing; the hint says how to mend it.
    """
    if not folder.is_dir():
        raise ModelError(
            f"model folder not found: {folder}",
            "check model.source in the recipe; it is relative to it",
        )
    names = [path.name for path in folder.iterdir()]
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise ModelError(
                f"{folder} is a LoRA adapter, not a model",
                "name its base in model.source, and serve the adapter with serve.adapters",
            )
        raise ModelError(
            f"{folder} has no config.json, so it is not a model folder", _nearby(folder)
        )
    if not any(name.endswith(".safetensors") for name in names):
        _refuse_weights(folder, names)
    if not any(name in names for name in TOKENIZER_FILES):
        raise ModelError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)})",
            "copy the tokenizer's files beside the weights",
        )


def _nearby(folder: Path) -> str | None:
    found = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"did you mean {folder / found[0]}?" if found else None


def _refuse_weights(folder: Path, names: list[str]) -> None:
    pickled = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in PICKLED))
    if not pickled:
        raise ModelError(f"{folder} has no weights (*.safetensors)", "was the download complete?")
    raise ModelError(
        f"{folder} has only pickled weights ({pickled[0]}): loading can run code",
        "save them as safetensors once, where you trust them: "
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}').save_pretrained('{folder}')\"",
    )


def set_template(folder: Path, override: Path | None = None) -> str | None:
    """Leave exactly one chat template in ``folder``, in ``chat_template.jinja``; return its text.

    Older folders keep it in ``tokenizer_config.json``, as one text or as a list of named ones, of
    which ``default`` is taken.

    Raises:
        ModelError: ``override`` does not exist or is empty.
    """
    path, config_path = folder / TEMPLATE, folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) if config_path.is_file() else {}
    text = _template_in(config.pop("chat_template", None))
    if config_path.is_file():
        config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if path.is_file():
        text = path.read_text()
    if override is not None:
        text = _override(override)
    if text is not None:
        path.write_text(text)
    return text


def _override(path: Path) -> str:
    if not path.is_file():
        raise ModelError(
            f"chat template not found: {path}",
            "model.chat_template is a path relative to the recipe",
        )
    if not (text := path.read_text()).strip():
        raise ModelError(f"chat template is empty: {path}")
    return text


def _template_in(value: str | list[dict[str, str]] | None) -> str | None:
    if value is None or isinstance(value, str):
        return value
    named = {entry["name"]: entry["template"] for entry in value}
    return named.get("default") or next(iter(named.values()), None)


def set_generation_config(folder: Path) -> None:
    """Write a missing ``generation_config.json``, so that engines know where to stop."""
    path = folder / "generation_config.json"
    if not path.is_file():
        config = _text_config(folder)
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        path.write_text(
            json.dumps({k: config[k] for k in keys if config.get(k) is not None}, indent=2) + "\n"
        )


def set_modes(folder: Path) -> None:
    """Make our own files readable (safetensors writes 0600); hard links keep their mode."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:
            path.chmod(0o644)


def describe(folder: Path) -> dict[str, Any]:
    """Facts about a finished model folder, read without torch.

    Returns:
        ``architecture``, the sizes of ``config.json`` (``None`` where it has no such key),
        ``parameters`` and ``dtype`` from the headers of the weights, ``template_sha256``,
        ``tokenizer_sha256`` and ``files`` (bytes by name).
    """
    config = _text_config(folder)
    parameters, dtype = _weights(folder)
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    sizes = {key: config.get(key) for key in keys}
    sizes["num_layers"] = sizes.pop("num_hidden_layers")
    template = folder / TEMPLATE
    tokenizer = next(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    return {
        "architecture": (_config(folder).get("architectures") or ["unknown"])[0],
        **sizes,
        "parameters": parameters,
        "dtype": dtype,
        "template_sha256": file_sha256(template) if template.is_file() else None,
        "tokenizer_sha256": file_sha256(tokenizer),
        "files": {
            path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()
        },
    }


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not JSON: {error}") from error
    return config


def _text_config(folder: Path) -> dict[str, Any]:
    config = _config(folder)
    inner: dict[str, Any] = config.get(
        "text_config", {}
    )  # models with eyes or ears keep the language part there
    return {**config, **inner}


def _weights(folder: Path) -> tuple[int, str]:
    """Number of parameters, and the type of most of them in safetensors' words (``BF16``)."""
    count: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        for tensor in _header(path).values():
            size = 1
            for length in tensor["shape"]:
                size *= length
            count[tensor["dtype"]] += size
    if not count:
        raise ModelError(f"the weights in {folder} hold no tensors")
    return sum(count.values()), count.most_common(1)[0][0]


def _header(path: Path) -> dict[str, Any]:
    """A safetensors header: 8 bytes little-endian length, then JSON."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= path.stat().st_size - 8:
            raise ModelError(f"{path} is cut off or not safetensors", "download it again")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header
