"""Jobs on this machine: places are GPUs and slots; the keeper gives them out and starts the shim."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from toolkit.engines.guard import processes, send, start_time
from toolkit.errors import BackendError, NoPlaceError
from toolkit.launch import secrets
from toolkit.launch.folder import JobFolder
from toolkit.launch.local.places import Places
from toolkit.launch.locks import CHECK_S, HELD, is_held, take
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import Seen, State

MARK = "TOOLKIT_JOB"
"""Environment variable of all processes of a job: its folder."""


class Local:
    """Starts shims as processes that outlive who started them."""

    name: ClassVar[str] = "local"
    ordered: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Any], folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    @cached_property
    def _places(self) -> Places:
        from toolkit.launch.local.section import LocalSection

        return Places(LocalSection.model_validate(self._options))

    def render(self, job: JobSpec, after: Mapping[str, str]) -> str:  # noqa: ARG002 - the keeper waits for those
        """The process to start, as JSON; secrets and GPUs are filled in when it has its place."""
        process = {
            "argv": list(job.argv),
            "env": dict(job.env) | {MARK: job.folder},
            "secrets": dict(job.secrets),
            "cwd": job.folder,
            "gpus": job.resources.gpus,
        }
        return json.dumps(process, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def submit(self, job: JobSpec, after: Mapping[str, str]) -> str:
        """Start the job in a place of this machine, unless it runs.

        Raises:
            NoPlaceError: All places are taken.
            BackendError: There is no such place here, or a secret is missing.
        """
        lock = os.open(
            JobFolder(Path(job.folder)).lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        with contextlib.closing(os.fdopen(lock, "w")):
            if not take(lock, seconds=CHECK_S):
                return job.id
            self._start(job, json.loads(self.render(job, after)), lock)
        return job.id

    def _start(self, job: JobSpec, process: Mapping[str, Any], lock: int) -> None:
        places = self._places
        taken = places.take(job.resources)
        if taken is None:
            what = f"{job.resources.gpus} of GPUs {places.gpus}" if job.resources.gpus else "a slot"
            raise NoPlaceError(f"waits for {what}: all taken")
        held = (lock, *taken.descriptors)
        environ = os.environ | process["env"] | secrets.values(process["secrets"])
        environ[HELD] = ",".join(map(str, held))
        if places.gpus:
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, taken.gpus))
        try:
            with (Path(job.folder) / "start.log").open("ab") as log:
                started = subprocess.Popen(
                    process["argv"],
                    env=environ,
                    cwd=process["cwd"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=held,
                    start_new_session=True,
                )
        except OSError as error:
            raise BackendError(f"cannot start {process['argv'][0]}: {error.strerror}") from error
        finally:
            taken.close()
        self._started = [one for one in self._started if one.poll() is None]
        self._started.append(started)

    def reap(self) -> None:
        """Collect ended shims."""
        self._started = [one for one in self._started if one.poll() is None]

    def seen(self, ids: Sequence[str]) -> Mapping[str, Seen]:
        """Whether their processes live."""
        found = {}
        for one in ids:
            lives = is_held(self._job(one).lock)
            found[one] = Seen(State.running, "lives") if lives else Seen(State.queued, "waits")
        return found

    def lives(self, job: JobSpec) -> bool:
        """Whether a shim or a worker of it is there."""
        return is_held(Path(job.folder) / "lock")

    def cancel(self, ids: Sequence[str]) -> None:
        """Ask the shims to end; they know from the job's folder that it is for good."""
        for one in ids:
            attempts = self._job(one).attempts
            begun = attempts[-1].started if attempts else None
            if begun and start_time(begun["pid"]) == begun["start_time"]:
                send({int(begun["pid"])}, signal.SIGTERM)

    def end_all(self, job: JobSpec) -> list[int]:
        """Kill every process of a job, wherever it went; their ids."""
        mark = f"{MARK}={job.folder}".encode()
        found = [pid for pid in processes() if pid != os.getpid() and mark in _environ(pid)]
        send(set(found), signal.SIGKILL)
        return found

    def logs(self, job: JobSpec, engine_id: str) -> Iterator[str] | None:  # noqa: ARG002
        """Its folder is here."""
        return None

    def _job(self, name: str) -> JobFolder:
        chain = re.match(r"(.+-[0-9a-f]{8})-\d\d-", name)
        return JobFolder(self._folder / (chain[1] if chain else name) / name)


def _environ(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's, or gone
        return []
