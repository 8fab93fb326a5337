"""What a profile says about a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from toolkit.recipe.base import Section


class RaySection(Section):
    """A Ray cluster that is there, whose nodes see the workspace under the path that it has here."""

    address: Annotated[str, Field(pattern=r"^https?://")] = "http://127.0.0.1:8265"
    """The dashboard, where the Jobs API is; `https://` through whatever ends TLS in front of it."""
    token: str | None = None
    """Where the cluster's token is: `env:NAME` or `file:/path`; unless given, where Ray itself looks for it."""
    ca: str | None = None
    """File with the certificate authority of an `https://` address, when the system does not know it."""
    runtime_env: Literal["none", "lock"] = "none"
    """`lock`: Ray installs the core's lock with pip where a job comes to, and keeps it there."""
    resources: Mapping[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom resources that every job takes: `accelerator_type:H100: 0.001`."""
    labels: Mapping[str, str] = Field(default_factory=dict)
    """Labels that a node must have: `ray.io/market-type: on-demand`."""
    timeout_s: Annotated[float, Field(gt=0)] = 30
    """The head is given so long to answer, seconds."""
