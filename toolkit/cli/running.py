"""A running server, reached over its control socket."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.cli import render

if TYPE_CHECKING:
    from toolkit.serving.state import AdapterSpec

PATIENCE_S = 3600.0
"""Longest wait for a change: loads, proofs, and old streams that finish."""
POLL_S = 0.3


class RunningServer:
    """Asks and orders."""

    def __init__(self, name: str, control: Path, place: Path) -> None:
        self.name, self._control, self._place = name, control, place

    @classmethod
    def pick(cls, name: str | None, workspace: Path | None) -> RunningServer:
        """The server of that name, or the only one that runs."""
        from toolkit.engines import records
        from toolkit.workspace import Workspace

        servers = Workspace.locate(workspace).servers
        record = records.pick(servers, name)
        return cls(record.name, Path(record.control), servers / record.name)

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = 10.0,
    ) -> dict[str, Any]:
        """Its answer."""
        from toolkit.serving.control import request

        return request(self._control, method, path, body, timeout_s=timeout_s)

    def bring(self, name: str, source: str) -> AdapterSpec:
        """An adapter from ``source``, at a place where it stays as it is."""
        from toolkit.serving.registry import ModelRegistry
        from toolkit.serving.sources import bring
        from toolkit.serving.state import ServerSpec

        registry = ModelRegistry.of(ServerSpec.read(self._place))
        return bring(name, source, Path.cwd(), registry)

    def order(
        self, order: str, body: Mapping[str, Any], line: render.ProgressLine, *, as_json: bool
    ) -> None:
        """Send an order, and show what the server is doing until it is done."""
        from concurrent.futures import ThreadPoolExecutor, wait

        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.ask, "POST", f"/adapters/{order}", body, PATIENCE_S)
            while not wait([answer], POLL_S).done:
                line.update(self._doing())
        done = answer.result()
        line.close(_shown(done))
        if as_json:
            render.as_json(done)
            return
        for name, text in done["proven"].items():
            render.hint(f"{name}: {text}")
        if done["cut"]:
            render.hint(f"{done['cut']} requests were still open on the old version")

    def _doing(self) -> str:
        from toolkit.errors import EngineError

        try:
            return str(self.ask("GET", "/adapters")["doing"])
        except EngineError:
            return "no answer"


def _shown(done: Mapping[str, Any]) -> str:
    parts = [f"loaded {', '.join(done['loaded'])}"] if done["loaded"] else []
    parts += [f"unloaded {', '.join(done['unloaded'])}"] if done["unloaded"] else []
    times = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in done["seconds"].items())
    return f"{'; '.join(parts) or 'nothing to do'} ({times})"
