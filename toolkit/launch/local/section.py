"""The profile's section for this machine."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from toolkit.recipe.base import Section


class LocalSection(Section):
    """Places of this machine. Every user and workspace of it shares them."""

    gpus: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Indexes of the GPUs that jobs may have; all that the driver shows unless given."""
    slots: Annotated[int, Field(ge=1)] | None = None
    """Jobs without a GPU that run at once; one for every four cores unless given."""
    folder: str | None = None
    """Folder of the places' lock files, the same for all who share the machine."""
