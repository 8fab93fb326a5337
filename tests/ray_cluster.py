"""A real Ray on this machine, for tests, from the environment ``ray`` (``toolkit env sync ray``).

``TOOLKIT_TEST_RAY`` may name another interpreter that has Ray.
"""

import json
import os
import secrets
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from urllib.error import URLError
from urllib.request import Request, urlopen

import psutil
import pytest

from tests.start_ray import free_ports
from toolkit import environments

START_S = 150
STARTS = 2


def ray_python() -> str:
    given = os.environ.get("TOOLKIT_TEST_RAY")
    return given or str(environments.from_lock("ray").interpreter().python)


class RayCluster:
    """Use it as a context: everything that it started ends with it, found by a variable of its environment."""

    def __init__(self, python: str, *, start_timeout_s: int = 900) -> None:
        self.python, self.start_timeout_s = python, start_timeout_s
        self.token = secrets.token_hex(24)

    def __enter__(self):
        for attempt in range(1, STARTS + 1):  # its parts have 30 seconds for each other
            self._start()
            if self._is_up():
                return self
            text = (self.folder / "log.txt").read_text()
            self.__exit__()
            if attempt == STARTS:
                pytest.skip(f"Ray did not start here, tried {STARTS} times: {text[-1000:]}")
        return None

    def _start(self) -> None:
        # Short on purpose: the path of a socket has 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        [port] = free_ports(1)
        self.address = f"http://127.0.0.1:{port}"
        self.token_file = self.folder / "token"
        self.token_file.write_text(self.token + "\n")
        self.mark = f"of-{self.folder.name}"
        script = Path(__file__).with_name("start_ray.py")
        environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environ["TOOLKIT_TEST_MARK"] = self.mark
        environ["RAY_JOB_START_TIMEOUT_SECONDS"] = str(self.start_timeout_s)
        with (self.folder / "log.txt").open("wb") as log:
            self.process = subprocess.Popen(
                [self.python, script, self.folder, str(port), self.token], env=environ,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _is_up(self) -> bool:
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def __exit__(self, *_):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(3)
        for one in self.processes():
            with suppress(psutil.Error):
                one.kill()
        self.process.wait(20)
        rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """All processes of this cluster, and of its jobs."""
        found = []
        for one in psutil.process_iter():
            with suppress(psutil.Error):
                if one.environ().get("TOOLKIT_TEST_MARK") == self.mark:
                    found.append(one)
        return found

    def supervisor_of(self, pid: int) -> psutil.Process:
        """The actor that watches the job whose program is ``pid``: the parent of the shell or of what it became."""
        found = psutil.Process(pid).parent()
        while found is not None and "JobSupervisor" not in found.name() + " ".join(found.cmdline()):
            found = found.parent()
        assert found is not None
        return found

    def _answers(self) -> bool:
        """Whether a node is up that takes jobs."""
        asked = Request(
            f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"}
        )
        try:
            with urlopen(asked, timeout=10) as answer:
                json.load(answer)
        except (URLError, OSError):
            return False
        return "Ray runtime started" in (self.folder / "log.txt").read_text()
