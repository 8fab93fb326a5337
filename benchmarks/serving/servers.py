"""Start a server, wait until it answers, stop it and wait until its GPU memory is free again."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import Launch
from results import said

from toolkit.engines.phases import PhaseReader

POLL_S = 0.25
STOP_S = 25
FREE_MIB = 3000
"""GPU memory that may be in use before the next engine starts."""

Phases = tuple[tuple[str, str], ...]


class BenchmarkError(Exception):
    """A measurement could not be taken; the run goes on with the next."""


@dataclass
class Running:
    """A server that answers."""

    url: str
    launch: Launch
    seconds: float
    phases: Mapping[str, float]

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float = 120) -> str:
        """Send JSON; the answer's text.

        Raises:
            BenchmarkError: Any answer but 2xx, or none.
        """
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                text: bytes = answer.read()
        except urllib.error.HTTPError as error:
            raise BenchmarkError(f"{path} answered {error.code}: {error.read()[:400]!r}") from None
        except OSError as error:
            raise BenchmarkError(f"{path}: {error}") from None
        return text.decode()


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Whether ``url`` gives 200 within two seconds."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


@contextlib.contextmanager
def running(
    launch: Launch,
    port: int,
    log: Path,
    *,
    timeout_s: float,
    phases: Phases = (),
    health: str = "/health",
) -> Iterator[Running]:
    """A healthy server for as long as the block runs.

    Raises:
        BenchmarkError: It ended, or was not healthy in time; the end of its log is in it.
    """
    begin, url = time.monotonic(), f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.argv,
            env=environ(launch),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    reader = PhaseReader(phases, log)
    try:
        while not answers(f"{url}{health}"):
            reader.update()
            taken = time.monotonic() - begin
            if process.poll() is not None or taken > timeout_s:
                how = (
                    f"ended with {process.returncode}" if process.poll() is not None else "too slow"
                )
                raise BenchmarkError(f"{how} after {taken:.0f} s: {log}\n{tail(log)}")
            time.sleep(POLL_S)
        reader.update()
        yield Running(url, launch, round(time.monotonic() - begin, 1), reader.seconds())
    finally:
        stop(process)


def environ(launch: Launch) -> dict[str, str]:
    """This process's variables with the launch's; bytecode is kept, or no start would find the last one's."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return kept | launch.env


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process group of ours, first kindly."""
    for number, wait_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def await_free_gpu(timeout_s: float = 40) -> None:
    """Return when the last server's memory is free, or when that takes too long."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and used_mib() > FREE_MIB:
        time.sleep(0.5)


def used_mib() -> int:
    """GPU memory in use; 0 without a GPU."""
    text = said("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    return int(text.split()[0]) if text else 0


def tail(log: Path, lines: int = 25) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def put_table(control: Path, table: str) -> None:
    """Tell a front what it serves.

    Raises:
        BenchmarkError: It refuses, or its socket does not answer within 20 s.
    """
    end = time.monotonic() + 20
    while True:
        connection = _UnixConnection(control)
        try:
            connection.request("PUT", "/table", table, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status < 300:
                return
            raise BenchmarkError(f"PUT /table answered {answer.status}: {answer.read()[:400]!r}")
        except OSError as error:
            if time.monotonic() > end:
                raise BenchmarkError(f"the front's control socket: {error}") from None
            time.sleep(POLL_S)
        finally:
            connection.close()
