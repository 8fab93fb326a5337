"""The MLflow UI as a child process: started, watched, and ended with all it started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from toolkit.errors import NotInstalledError, TrackingError, UsageError
from toolkit.tracking.store import Store
from toolkit.workspace import private_folder

READY_S = 180.0
"""How long the server may take; it was healthy after 10 to 50 s on two cores."""

STOP_S = 5.0

GUARD = """
import ctypes, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
sys.exit(subprocess.call([sys.executable, *sys.argv[2:]]))
"""
"""Leads the server's process group, and ends all of it when it is told to or when we are gone."""


def command(store: Store, host: str, port: int) -> list[str]:
    """The arguments that start MLflow's server on ``store``."""
    argv = [sys.executable, "-c", GUARD, str(os.getpid())]
    argv += ["-m", "mlflow", "server", "--backend-store-uri", store.uri]
    argv += ["--host", host, "--port", str(port), "--workers", "1"]
    if store.artifact_root is not None:
        argv += ["--artifacts-destination", str(store.artifact_root)]
    return argv


def require_server() -> None:
    """Raise :class:`NotInstalledError` where only MLflow's client is installed."""
    if find_spec("flask") is None or find_spec("uvicorn") is None:
        raise NotInstalledError(
            "the MLflow UI is not installed: the core has only MLflow's client",
            "pip install 'toolkit[ui]'",
        )


def require_port(host: str, port: int) -> None:
    """Raise :class:`UsageError` if ``host:port`` cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"port {port} on {host} is not free: {error.strerror}",
                f"toolkit ui --port {free_port(host)}",
            ) from error


def free_port(host: str) -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise UsageError(
                f"{host} is no address of this machine", "toolkit ui --host 127.0.0.1"
            ) from error
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(store: Store, host: str, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start the UI and yield its process once it answers; end it, and all it started, at the exit.

    Raises:
        NotInstalledError: The server part of MLflow is missing.
        UsageError: The port is taken.
        TrackingError: The server ended or did not answer; names its log.
    """
    require_server()
    require_port(host, port)
    private_folder(log.parent)
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command(store, host, port),
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        _wait(process, f"http://{_loopback(host)}:{port}/health", log)
        yield process
    finally:
        _end(process)


def _loopback(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise TrackingError(
                f"the MLflow UI ended with {process.returncode}: {_last_line(log)}",
                f"its log is {log}",
            )
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):  # noqa: S310 - http
            return
        time.sleep(0.3)
    raise TrackingError(f"the MLflow UI did not answer in {READY_S:g} s", f"its log is {log}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group: MLflow's command starts uvicorn, which starts workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    process.wait()
