"""``serve.adapters:`` finished adapters beside the trained one, from folders or the MLflow registry."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import AfterValidator, model_validator

from toolkit.recipe.base import Fraction, Name, Section

REGISTRY = "models:/"
_VERSION = re.compile(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))")


def parse_registered(source: str) -> tuple[str, str | None, str | None]:
    """Read ``models:/name/3`` or ``models:/name@alias``: name, and version or alias.

    Raises:
        ValueError: It is neither.
    """
    match = _VERSION.fullmatch(source)
    if match is None:
        raise ValueError(
            f"{source!r} names no registered adapter: write models:/NAME/VERSION or models:/NAME@ALIAS"
        )
    return match[1], match[2], match[3]


def _source(text: str) -> str:
    if text.startswith(REGISTRY):
        parse_registered(text)
    return text


Source = Annotated[str, AfterValidator(_source)]


class CanarySection(Section):
    """A second version of an adapter that takes a share of its requests."""

    path: Source
    """Folder relative to the recipe, `models:/name@alias` or `models:/name/3`."""
    weight: Fraction = 0.1
    """Share of the requests, 0 to 1; with 0 only those that ask for it by the header."""
    header: Name = "canary"
    """Value of the request header `x-toolkit-target` that asks for it; also its name in metrics."""

    @model_validator(mode="after")
    def _is_not_stable(self) -> Self:
        if self.header == "stable":
            raise ValueError(
                "header is 'stable', which is the other version: give the canary a name of its own"
            )
        return self


class AdapterSection(Section):
    """A finished adapter that is loaded beside the one the recipe trains."""

    name: Name
    """Model name that clients ask for."""
    path: Source
    """Folder relative to the recipe, `models:/name@alias` or `models:/name/3` in the MLflow registry."""
    canary: CanarySection | None = None
    """A second version to try on a share of the requests."""

    @property
    def folders(self) -> dict[str, str]:
        """Folders that it names, by what to call them; what the registry holds is looked at when it is here."""
        named = {self.name: self.path}
        if self.canary:
            named[f"{self.name} {self.canary.header}"] = self.canary.path
        return {name: path for name, path in named.items() if not path.startswith(REGISTRY)}
