"""``python -m toolkit.gateway SETTINGS.json``: the front, one process, started by the supervisor.

It ends with 0 when it drained (``POST /drain``, or SIGTERM), with 1 when its supervisor is gone: standard input is the
supervisor's pipe, and when it closes the front first ends what dead engines left behind. A second signal ends it now.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import signal
import stat
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import uvloop

from toolkit.errors import ToolkitError
from toolkit.gateway.access import access_of
from toolkit.gateway.access_log import AccessLog
from toolkit.gateway.app import Front
from toolkit.gateway.cache import cache_of
from toolkit.gateway.control import Control, private_socket
from toolkit.gateway.generation import Parts
from toolkit.gateway.metrics import Metrics
from toolkit.gateway.server import Server, public_socket
from toolkit.gateway.settings import GatewaySettings
from toolkit.gateway.traces import Traces
from toolkit.gateway.traffic import Traffic
from toolkit.gateway.upstream import Upstream

DRAIN_S = 30.0
"""For a SIGTERM that did not come through the supervisor."""
FORSAKEN = 1
"""Exit code when the supervisor is gone."""


def main(arguments: list[str]) -> int:
    """Run the front with the settings in the file that is named."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = GatewaySettings.model_validate_json(Path(arguments[0]).read_bytes())
        _many_files()
        return uvloop.run(run(settings))
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the supervisor shows our last lines
        return error.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1


async def run(settings: GatewaySettings) -> int:
    """Serve until drained or forsaken; return the exit code."""
    async with _parts(settings) as parts:
        public = public_socket(settings.host, settings.port)
        control = private_socket(settings.control)
        servers = Server(Front(settings, parts)), Server(Control(parts.traffic))
        loop = asyncio.get_running_loop()
        forsaken = _watch_supervisor(loop)
        _on_signals(loop, parts.traffic)
        _tell(settings, public.getsockname()[1])
        gc.freeze()  # what is here now stays: do not look at it in every collection
        gc.set_threshold(20_000, 20, 20)
        serving = asyncio.gather(servers[0].serve_on(public), servers[1].serve_on(control))
        await _first(serving, parts.traffic.over.wait(), forsaken)
        if forsaken.done():
            await asyncio.to_thread(_reap)
            parts.traffic.end_now()
        for server in servers:
            server.should_exit = True
        await serving
        settings.control.unlink(missing_ok=True)
        return FORSAKEN if forsaken.done() else 0


@contextlib.asynccontextmanager
async def _parts(settings: GatewaySettings) -> AsyncIterator[Parts]:
    metrics = Metrics()
    access, cache = access_of(settings), cache_of(settings.front.cache)
    parts = Parts(access, Upstream(), Traffic(metrics), metrics, cache)
    log = AccessLog(settings.access_log)
    log.start()
    parts.sinks.append(log)
    traces = None
    if settings.front.traces and settings.tracking_uri:
        traces = Traces(settings.tracking_uri, settings.name)
        await asyncio.to_thread(traces.start)
        parts.sinks.append(traces)
    metrics.count_drops(
        lambda: {"access_log": log.dropped, "traces": traces.dropped if traces else 0}
    )
    try:
        yield parts
    finally:
        await parts.upstream.close()
        await access.close()
        if cache is not None:
            await cache.close()
        log.close()
        if traces is not None:
            traces.close()


def _watch_supervisor(loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
    """Done when the pipe on standard input closes; never, where it is no pipe (started by hand)."""
    gone: asyncio.Future[None] = loop.create_future()
    mode = os.fstat(0).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):

        def look() -> None:
            if not os.read(0, 4096):
                loop.remove_reader(0)
                gone.set_result(None)

        loop.add_reader(0, look)
    return gone


def _on_signals(loop: asyncio.AbstractEventLoop, traffic: Traffic) -> None:
    def stop() -> None:
        if traffic.draining:
            traffic.end_now()
        else:
            traffic.drain(DRAIN_S)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def _tell(settings: GatewaySettings, port: int) -> None:
    """Write who we are, complete or not at all."""
    if settings.state_file is not None:
        part = settings.state_file.with_name(settings.state_file.name + ".part")
        part.write_text(json.dumps({"pid": os.getpid(), "port": port}))
        part.replace(settings.state_file)


async def _first(*waited: asyncio.Future[Any] | Coroutine[Any, Any, Any]) -> None:
    tasks = [asyncio.ensure_future(one) for one in waited]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _reap() -> None:
    from toolkit.engines.orphans import reap

    with contextlib.suppress(OSError):
        reap()


def _many_files() -> None:
    """A stream takes two descriptors; take as many as the system gives."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
