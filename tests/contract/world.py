"""Chains of plain programs: what the contract asks of an engine needs no model."""

from __future__ import annotations

import getpass
import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolkit.launch import actions, causes, report
from toolkit.launch.dispatch import hand_over
from toolkit.launch.folder import JobFolder, write
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import State
from toolkit.workspace import private_folder

PACKAGES = Path(__file__).parents[2]
PATIENCE_S = 90.0


@dataclass
class World:
    """A workspace whose chains go to one engine."""

    folder: Path
    backend: str = "local"
    options: dict = field(default_factory=dict)
    number: int = 0
    python: str = sys.executable

    @property
    def jobs(self) -> Path:
        return private_folder(self.folder / "runs" / "jobs")

    def write(self, *commands, name="demo", **spec) -> str:
        """Write a chain of programs, one after the other, as a submitter would; its id."""
        self.number += 1
        chain = f"{name}-{self.number:08x}"
        ids = [f"{chain}-{n:02d}-step" for n in range(1, len(commands) + 1)]
        for n, argv in enumerate(commands):
            folder = private_folder(self.jobs / chain / ids[n])
            job = JobSpec(
                id=ids[n],
                chain=chain,
                step=f"step-{n + 1}",
                stage="data",
                folder=str(folder),
                after=tuple(ids[n - 1 : n]) if n else (),
                argv=(self.python, "-P", "-m", "toolkit.launch.shim", str(folder)),
                env={"PYTHONPATH": str(PACKAGES)},
                grace_s=8,
                options=self.options,
            )
            (folder / "job.json").write_text(replace(job, **spec).to_json())
            write(folder / "command.json", {"argv": [str(word) for word in argv]})
        write(self.jobs / chain / "parent.json", {"parent_run": None})
        write(
            self.jobs / chain / "chain.json",
            {
                "id": chain,
                "recipe": name,
                "profile": "test",
                "backend": self.backend,
                "options": self.options,
                "user": getpass.getuser(),
                "host": causes.host(),
                "at": time.time(),
                "jobs": {one: f"step-{n}" for n, one in enumerate(ids, 1)},
            },
        )
        return chain

    def submit(self, *commands, **spec) -> str:
        chain = self.write(*commands, **spec)
        hand_over(self.jobs / chain)
        return chain

    def record(self, chain: str) -> dict:
        return json.loads((self.jobs / chain / "chain.json").read_text())

    def reports(self, chain: str) -> list[report.JobReport]:
        return actions.look(self.jobs, [self.record(chain)])

    def job(self, chain: str, number: int = 1) -> JobFolder:
        return JobFolder(self.jobs / chain / f"{chain}-{number:02d}-step")

    def wait(self, chain: str, *states: State, number: int = 1, seconds: float = PATIENCE_S):
        """Wait until a job is in one of the states; its report."""
        end = time.monotonic() + seconds
        while True:
            found = self.reports(chain)[number - 1]
            if found.state in states:
                return found
            assert time.monotonic() < end, f"{found} after {seconds} s; log: {self.keeper_log()}"
            time.sleep(0.1)

    def ended(self, chain: str, number: int = 1, seconds: float = PATIENCE_S) -> report.JobReport:
        """Wait until a job is over."""
        states = (State.succeeded, State.failed, State.cancelled)
        return self.wait(chain, *states, number=number, seconds=seconds)

    def cancel(self, chain: str) -> list[report.JobReport]:
        return actions.cancel(self.jobs, actions.find(self.jobs, [chain]))

    def keeper_log(self) -> str:
        logs = (self.jobs / "keeper").glob("*/log.txt")
        return "".join(path.read_text()[-3000:] for path in logs)

    def keepers(self) -> list[int]:
        """Process ids of this workspace's keepers."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"toolkit.launch.keeper" in words and str(self.jobs).encode() in words:
                    found.append(int(entry.name))
        return found

    def close(self) -> None:
        """End the keeper and what jobs are left."""
        import signal

        for chain in report.chains(self.jobs):
            if not report.is_over(self.jobs / chain["id"]):
                self.cancel(chain["id"])
        for pid in self.keepers():
            os.kill(pid, signal.SIGKILL)
