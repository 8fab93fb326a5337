"""What every section of a recipe shares."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen part of a recipe that knows its keys: an unknown one is an error, a value is never changed."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def slug(value: str) -> str:
    """``value`` where it is a name; raises ValueError where not."""
    if not value or not all(c.isalnum() or c in "-_." for c in value) or not value[0].isalnum():
        raise ValueError(
            f"{value!r} is not a name: use letters, digits, '-', '_' and '.', first a letter or digit"
        )
    return value


Name = Annotated[str, AfterValidator(slug)]
"""A name that is safe in a path, an MLflow key and a model id."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
