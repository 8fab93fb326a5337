"""What a front is started with; it does not change while it runs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from toolkit.recipe.base import Section
from toolkit.recipe.front import FrontSection


class GatewaySettings(Section):
    """Written as JSON (mode 0600, no secrets in it) by the supervisor; ``python -m toolkit.gateway FILE`` reads it."""

    name: str
    """Name of the server, for logs and metrics."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    control: Path
    """Unix socket for the supervisor: PUT /table, GET /status, POST /drain."""
    front: FrontSection = FrontSection()
    keys_file: Path | None = None
    """Hashed API keys (see ``toolkit keys``); read again when it changes."""
    access_log: Path | None = None
    """JSON lines; standard error unless given."""
    tracking_uri: str | None = None
    """MLflow store for traces."""
    state_file: Path | None = None
    """Where the front writes ``{"pid", "port"}`` once it listens (port 0 takes a free one)."""
