"""A real Slurm on this one machine, from Debian's packages: two nodes that are none, GPUs that are none.

No systemd and nothing shared: own folder, ports, munge key and socket; everything is found through ``SLURM_CONF``.
It ends only what carries that variable with the path of its own file.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
NODES = ("fake0", "fake1")
PLACES = f"/usr/sbin:/usr/bin:/sbin:/bin:{os.environ.get('PATH', '')}"

CONFIGURATION = """\
ClusterName=fake
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounting}
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0,defer_batch=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait={kill_wait_s}
MinJobAge={min_job_age_s}
OverTimeLimit=0
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=4 RealMemory=4000 Gres=gpu:fake:2 State=UNKNOWN
NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 DefMemPerCPU=100
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 DefMemPerCPU=100
"""


ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket"""

DATABASE = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={storage}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""


def missing(*, accounting: bool = False) -> str | None:
    """Why no Slurm can be raised here; ``None`` if it can."""
    if accounting:
        needed = ("slurmdbd", "mariadbd", "mariadb-install-db")
        if any(shutil.which(name, path=PLACES) is None for name in needed):
            return (
                "no accounting here: apt-get install slurmdbd mariadb-server slurm-wlm-mysql-plugin"
            )
    lacking = [name for name in PROGRAMS if shutil.which(name, path=PLACES) is None]
    if lacking:
        return f"no {', '.join(lacking)} here: apt-get install slurmctld slurmd slurm-client munge"
    return None


@dataclass
class SlurmCluster:
    """``start`` it, use ``environ`` for the clients, ``stop`` it.

    Args:
        kill_wait_s: Seconds between SIGTERM and SIGKILL.
        min_job_age_s: How long an ended job is remembered.
        accounting: With slurmdbd and a database.
    """

    kill_wait_s: int = 30
    min_job_age_s: int = 300
    accounting: bool = False
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="slurm-")))
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    storage_port: int = 0

    @property
    def conf(self) -> Path:
        """The file that all programs read."""
        return self.folder / "slurm.conf"

    @property
    def environ(self) -> dict[str, str]:
        """Variables that lead the client programs here."""
        return {"SLURM_CONF": str(self.conf), "PATH": PLACES}

    def start(self) -> SlurmCluster:
        """Write the files, start the daemons, wait for both nodes."""
        self._write_files()
        self.start_munge()
        if self.accounting:
            self.start_accounting()
        self.start_controller()
        for name in NODES:
            self.start_node(name)
        self.wait_for(lambda: self.node_states() == dict.fromkeys(NODES, "idle"), 60)
        return self

    def _write_files(self) -> None:
        self.folder.chmod(0o755)
        first, *ports = _free_ports(1 + len(NODES))
        for name in ("state", *(f"spool-{name}" for name in NODES)):
            (self.folder / name).mkdir(exist_ok=True)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self.conf.write_text(
            CONFIGURATION.format(
                host=socket.gethostname().split(".")[0],
                folder=self.folder,
                user=getpass.getuser(),
                port=first,
                names=",".join(NODES),
                ports=",".join(map(str, ports)),
                accounting=self._accounting_lines(),
                kill_wait_s=self.kill_wait_s,
                min_job_age_s=self.min_job_age_s,
            )
        )
        # A GPU's file must be a character device; nobody opens it. Those of a terminal are everywhere.
        devices = ("/dev/null", "/dev/zero")
        lines = [f"NodeName={','.join(NODES)} Name=gpu Type=fake File={one}" for one in devices]
        (self.folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *lines]) + "\n")

    def _accounting_lines(self) -> str:
        if not self.accounting:
            return "AccountingStorageType=accounting_storage/none"
        port, self.storage_port = _free_ports(2)
        file = self.folder / "slurmdbd.conf"
        text = DATABASE.format(
            folder=self.folder, user=getpass.getuser(), port=port, storage=self.storage_port
        )
        file.touch(mode=0o600)
        file.write_text(text)
        return ACCOUNTING.format(port=port, folder=self.folder)

    def start_accounting(self) -> None:
        """A database of its own, and slurmdbd."""
        data, user = self.folder / "database", getpass.getuser()
        own = ["--no-defaults", f"--datadir={data}", f"--user={user}"]
        self.ask(
            "mariadb-install-db", *own, "--skip-test-db", "--auth-root-authentication-method=normal"
        )
        begin = self.folder / "begin.sql"
        begin.write_text(
            "CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';\n"
            "GRANT ALL ON slurm.* TO slurm@'127.0.0.1';\n"
        )
        places = [f"--socket={self.folder}/database.socket", f"--init-file={begin}"]
        net = ["--bind-address=127.0.0.1", f"--port={self.storage_port}", "--skip-name-resolve"]
        self._start("mariadbd", ["mariadbd", *own, *places, *net])
        self.wait_for(lambda: "ready for connections" in self._out("mariadbd"), 60)
        self._start("slurmdbd", ["slurmdbd", "-D"])
        self.wait_for(lambda: "Cluster" in self.ask("sacctmgr", "show", "cluster", check=False), 60)

    def _out(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text(errors="replace")

    def start_munge(self) -> None:
        """Who proves users to the daemons."""
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
        places = [f"--{name}={self.folder}/munge.{end}" for name, end in files.items()]
        own = ["--foreground", "--force", f"--seed-file={self.folder}/munge.seed"]
        self._start("munged", ["munged", *own, *places])
        self.wait_for((self.folder / "munge.socket").exists, 20)

    def start_controller(self) -> None:
        """slurmctld; it goes on from what it saved."""
        self._start("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])
        self.wait_for(lambda: "is UP" in self.ask("scontrol", "ping", check=False), 30)

    def start_node(self, name: str) -> None:
        """One slurmd."""
        self._start(name, ["slurmd", "-D", "-f", str(self.conf), "-N", name])

    def _start(self, name: str, argv: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.running[name] = subprocess.Popen(
                argv,
                env=os.environ | self.environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """SIGKILL to one daemon: ``slurmctld`` or a node's name."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def stop_controller(self) -> None:
        """End slurmctld in order: it saves what it knows."""
        process = self.running.pop("slurmctld")
        process.terminate()
        process.wait(30)

    def node_states(self) -> dict[str, str]:
        """Nodes by name, in Slurm's words."""
        told = self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t", check=False)
        return dict(line.split() for line in told.splitlines() if len(line.split()) == 2)

    def ask(self, *argv: str, check: bool = True, timeout_s: float = 60) -> str:
        """Output of a client program."""
        done = subprocess.run(
            argv,
            env=os.environ | self.environ,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr}")
        return done.stdout

    def wait_for(self, wanted: object, seconds: float) -> None:
        """Until ``wanted()`` holds.

        Raises:
            TimeoutError: It does not; with what the daemons wrote.
        """
        assert callable(wanted)
        end = time.monotonic() + seconds
        while not wanted():
            died = [name for name, one in self.running.items() if one.poll() is not None]
            if died or time.monotonic() > end:
                raise TimeoutError(f"not after {seconds} s; ended: {died}; {self.told()}")
            time.sleep(0.1)

    def told(self) -> str:
        """The last lines of all logs."""
        logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in logs)

    def processes(self) -> list[int]:
        """All processes of this cluster, its jobs' too: those whose SLURM_CONF is ours."""
        mark = f"SLURM_CONF={self.conf}".encode()
        pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [pid for pid in pids if pid != os.getpid() and mark in _environ(pid)]

    def steppers(self) -> list[int]:
        """The slurmstepd processes: one watches each step on its node."""
        return [pid for pid in self.processes() if _name(pid).startswith("slurmstepd")]

    def job_processes(self, number: str, *marks: bytes) -> list[int]:
        """Processes of one job, without those of Slurm itself; those that have all of some variables."""
        return self._without_slurms({f"SLURM_JOB_ID={number}".encode(), *marks})

    def array_processes(self, number: str) -> list[int]:
        """Processes of all tasks of an array, without those of Slurm itself."""
        return self._without_slurms({f"SLURM_ARRAY_JOB_ID={number}".encode()})

    def _without_slurms(self, marks: set[bytes]) -> list[int]:
        ours = set(self.processes()) - set(self.steppers())
        return [pid for pid in ours if marks <= set(_environ(pid))]

    def empty(self) -> None:
        """End all jobs; wait until none is left and both nodes are free."""
        for name in NODES:
            if name not in self.running:
                self.start_node(name)
        self.ask("scancel", f"--user={getpass.getuser()}")
        self.ask("scancel", "--user=nobody", check=False)
        self.wait_for(lambda: not self.ask("squeue", "--noheader", check=False).strip(), 60)
        self.wait_for(lambda: self.node_states() == dict.fromkeys(NODES, "idle"), 60)

    def stop(self) -> None:
        """End everything that is ours, and the folder."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.running.values():
            process.wait()
        self.running.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _environ(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
