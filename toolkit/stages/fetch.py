"""``fetch``: bring the base model here as one plain folder."""

from __future__ import annotations

from typing import ClassVar

from toolkit.recipe.base import Section
from toolkit.stages import Kind, StageContext, StageResult


class FetchConfig(Section):
    """What decides the bytes of the base model."""

    source: str
    revision: str | None = None
    sha256: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    digests: dict[str, str] = {}
    """sha256 of every local file that is read, by the path the recipe gives."""


class Fetch:
    """No inputs. Writes a model folder: config, safetensors, tokenizer, ``chat_template.jinja``, generation config."""

    name: ClassVar[str] = "fetch"
    produces: ClassVar[Kind] = Kind.model
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "train"

    def run(self, config: FetchConfig, ctx: StageContext) -> StageResult:
        """Download or convert the base model."""
        raise NotImplementedError
