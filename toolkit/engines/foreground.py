"""What ``toolkit serve`` does once its inputs are there: serve until told to stop, or detach."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from toolkit.engines import Deployment, records, server
from toolkit.engines.records import ServerRecord
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Input, Interpreter
from toolkit.workspace import Workspace, private_folder

OnReady = Callable[[ServerRecord], None]


class _StopRequestedError(Exception):
    """SIGTERM came, or SIGINT once the server was healthy."""


def serve_model(
    inputs: Mapping[str, Input],
    serve: ServeSection,
    interpreter: Interpreter,
    *,
    name: str,
    max_length: int,
    device: str,
    recipe_dir: Path,
    workspace: Workspace,
    detach: bool,
    on_phase: server.OnPhase,
    on_ready: OnReady,
) -> ServerRecord:
    """Serve one subject of a recipe.

    Args:
        inputs: ``model`` and perhaps ``adapter``, finished.
        serve: The recipe's section.
        interpreter: The engine's.
        name: What clients ask for, and the name for ``--stop``.
        max_length: Context in tokens.
        device: ``cpu`` or ``cuda``.
        recipe_dir: Folder that paths of ``serve.adapters`` start from.
        workspace: Where the record and the log go.
        detach: Return as soon as it is healthy and leave it running; otherwise return when it was told to stop.
        on_phase: Told what start-up is doing.
        on_ready: Told once, when it is healthy.

    Raises:
        EngineError: It did not start or died, or a server with this name runs already.
        KeyboardInterrupt: Ctrl-C came before it was healthy.
    """
    records.ensure_free(workspace.servers, name)
    deployment = Deployment.read(
        inputs["model"].path,
        adapter_paths(inputs, serve, name, recipe_dir),
        serve,
        name=name,
        max_length=max_length,
        device=device,
        trust_remote_code=inputs["model"].trusts_code,
    )
    log = private_folder(workspace.servers) / f"{name}.log"
    with (
        _sigterm_raises(),
        server.started(serve.engine, interpreter, deployment, log, on_phase) as running,
    ):
        record = _record(name, serve.engine, deployment, running, detached=detach)
        records.write(workspace.servers, record)
        if detach:
            running.detach()
        on_ready(record)
        if not detach:
            _serve_until_told(running, record, workspace.servers)
    return record


def adapter_paths(
    inputs: Mapping[str, Input], serve: ServeSection, name: str, recipe_dir: Path
) -> dict[str, Path]:
    """Adapters by the name that clients ask for: the trained one is ``name``, then those of the recipe."""
    trained = {name: inputs["adapter"].path} if "adapter" in inputs else {}
    finished = {a.name: (recipe_dir / Path(a.path).expanduser()).resolve() for a in serve.adapters}
    return {**trained, **finished}


def _serve_until_told(running: server.Server, record: ServerRecord, folder: Path) -> None:
    try:
        running.wait()
        # `toolkit serve --stop` ends the guard with the engine's own good-bye, which is code 0.
        running.check_ended()
    except (KeyboardInterrupt, _StopRequestedError):
        pass  # the way to end a foreground server
    finally:
        server.stop(running.process)
        records.remove(folder, record.name)


def _record(
    name: str, engine: str, deployment: Deployment, running: server.Server, *, detached: bool
) -> ServerRecord:
    return ServerRecord(
        name=name,
        url=running.url,
        models=running.models,
        engine=engine,
        model=str(deployment.model),
        pid=running.pid,
        started=running.started,
        log=str(running.log),
        detached=detached,
    )


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _StopRequestedError

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _StopRequestedError:
        raise KeyboardInterrupt from None  # before it was healthy: a start was broken off
    finally:
        signal.signal(signal.SIGTERM, previous)
