"""GGUF files become a model folder: bf16 safetensors, the tokenizer as meant, the chat template.

Transformers reads the weights. What it loses of the tokenizer is put back here from the file's
metadata: how text is split before the merges (``tokenizer.ggml.pre``), the special tokens, and
plain byte-level decoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ModelError

SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r")
"""Values of ``tokenizer.ggml.pre`` that cut every digit apart before the byte-level split."""
PROBE = 'Order  48291 , "naïve" — it\'s 7:05!\n\tok ▁'
"""Text with runs of spaces and digits, quotes, accents: a tokenizer must give it back as it was."""


@dataclass(frozen=True)
class Metadata:
    """What a GGUF file says about its tokenizer. Ids are ``None`` where the file has none."""

    model: str  # "gpt2" is byte-level BPE, "llama" SentencePiece
    pre: str | None
    template: str | None
    context_length: int | None
    special: dict[str, int | None]  # by "bos", "eos", "unk", "pad"


def read_metadata(path: Path) -> Metadata:
    """Read the header of a GGUF file.

    Raises:
        ModelError: Not GGUF, cut off, or one part of a split file.
    """
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise ModelError(
            f"{path.name} is one part of a split GGUF file",
            "join the parts first: llama-gguf-split --merge FIRST OUT",
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(
                f"{path} is not a GGUF file",
                "a Git LFS pointer or an error page? download it again",
            )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{path} is damaged: {error}", "download it again") from error

    def value(key: str) -> Any:
        field = reader.fields.get(key)
        return None if field is None else field.contents()

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return Metadata(
        model=value("tokenizer.ggml.model") or "unknown",
        pre=value("tokenizer.ggml.pre"),
        template=value("tokenizer.chat_template"),
        context_length=value(f"{value('general.architecture')}.context_length"),
        special={
            ours: value(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()
        },
    )


def convert(
    path: Path, output: Path, note: Callable[[str], None], step: Callable[[int, int], None]
) -> None:
    """Write the model of ``path`` into ``output``: bf16 weights, tokenizer, template, stop token.

    Args:
        path: A GGUF file of an architecture that Transformers can read.
        output: Existing empty folder.
        note: Told in one line what happens.
        step: Told how many of how many steps are done.

    Raises:
        ModelError: The file is damaged, or its tokenizer does not give a text back as it was.
    """
    metadata = read_metadata(path)
    note(f"reading the tokenizer of {path.name}")
    step(0, 3)
    _save_tokenizer(path, output, metadata, note)
    step(1, 3)
    note("turning the weights into bf16")
    model = _load(path)
    step(2, 3)
    note("writing safetensors")
    _save_model(model, output, metadata)
    step(3, 3)


def _load(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # a log file is no terminal
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # without it the model cannot be saved
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"Transformers cannot read {path.name}: {error}",
            "take the model from a folder or the Hub instead",
        ) from error
    return model.to(torch.bfloat16)


def _save_model(model: Any, output: Path, metadata: Metadata) -> None:
    from transformers import GenerationConfig

    ids = {f"{name}_token_id": id_ for name, id_ in metadata.special.items() if name != "unk"}
    model.generation_config = GenerationConfig(
        **{key: id_ for key, id_ in ids.items() if id_ is not None}
    )
    model.save_pretrained(output)
    config_path = output / "config.json"
    config = json.loads(config_path.read_text())
    config.pop(
        "_model_name_or_path", None
    )  # the file's training name, mistaken for a Hub id by some readers
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_tokenizer(
    path: Path, output: Path, metadata: Metadata, note: Callable[[str], None]
) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    if metadata.model == "gpt2":
        _repair(backend, metadata, note)
    special = {
        f"{name}_token": backend.id_to_token(id_)
        for name, id_ in metadata.special.items()
        if id_ is not None
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,  # it would join ' ,' to ',' in what a model wrote
        model_max_length=metadata.context_length,
        **special,
    )
    check_tokenizer(tokenizer, path.name, digits=metadata.pre in SPLIT_DIGITS)
    if metadata.template:
        tokenizer.chat_template = metadata.template
    tokenizer.save_pretrained(output)
    _name_the_common_class(output / "tokenizer_config.json")


def _repair(backend: Any, metadata: Metadata, note: Callable[[str], None]) -> None:
    """Put the byte-level pieces back, in place."""
    from tokenizers import decoders, pre_tokenizers

    backend.decoder = decoders.ByteLevel()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if metadata.pre in SPLIT_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif metadata.pre == "gpt-2":
        backend.pre_tokenizer = byte_level
    else:
        note(f"text split {metadata.pre!r} stays as Transformers reads it: compare tokenizers")


def check_tokenizer(tokenizer: Any, name: str, *, digits: bool) -> None:
    """Refuse a tokenizer that loses text or, where ``digits`` are to be cut apart, joins them.

    Raises:
        ModelError: With the text that went in and what came out.
    """
    back = tokenizer.decode(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    if back.lstrip() != PROBE.lstrip():  # SentencePiece may put one space in front
        raise ModelError(
            f"the tokenizer of {name} turns {PROBE!r} into {back!r}",
            "use the model's original tokenizer",
        )
    pieces = tokenizer.tokenize("0123456789")
    if digits and len(pieces) != 10:
        raise ModelError(
            f"the tokenizer of {name} joins digits: {pieces}", "use the model's original tokenizer"
        )


def _name_the_common_class(path: Path) -> None:
    """Name the class that every Transformers knows; version 5 writes a new name for the same."""
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("is_local", None)
    config.pop("local_files_only", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
