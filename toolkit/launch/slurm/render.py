"""A job, or an array of jobs, as a batch script. Pure; nothing of the machine goes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from toolkit.errors import UsageError
from toolkit.launch.slurm.quoting import array, directive, export, variable, word
from toolkit.launch.slurm.section import ContainerSection, SlurmSection
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import PREEMPTED

OUTPUT = "slurm.txt"
"""In the job's folder: what the script and Slurm itself say, of all attempts."""
ENDED = "slurm.json"
"""In the job's folder: how the script ended last."""
APPEND = f"exec >>{OUTPUT} 2>&1"
"""Where Slurm cannot be given the file."""
SECOND_COPY = 4
"""Exit code of a program that finds the job running elsewhere."""
ADDRESS = r'''address="$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"'''
"""Where Slurm itself finds the first node: its name in Slurm need be known to nobody else."""
MARK = "toolkit:"
"""A comment that begins so is a job of ours."""


@dataclass(frozen=True)
class Words:
    """How a script calls its job, in bash: an array's script has variables, set by the number of the task."""

    number: str
    id: str
    mark: str
    folder: str


def script(job: JobSpec, options: SlurmSection, after: Mapping[str, str], round_: int = 1) -> str:
    """What sbatch reads, started in the job's folder.

    Args:
        job: The job.
        options: The profile's section.
        after: Engine ids of the jobs that have to succeed first.
        round_: How often people had it tried: 1 before any ``toolkit jobs retry``.

    Raises:
        UsageError: A value cannot stand in a script.
    """
    names = [("job-name", job.id), ("comment", mark(job.id, round_))]
    output = "/dev/null" if _patterned(job) else OUTPUT
    wait = "afterok:" + ":".join(sorted(map(number, after.values()))) if after else None
    head = directives(job, options, [*names, ("output", output)], wait)
    words = Words("$SLURM_JOB_ID", job.id, word(mark(job.id, round_)), word(job.folder))
    return joined(
        head,
        [f"cd -- {words.folder} || exit", *([APPEND] if _patterned(job) else [])],
        body(job, options, words, array("program", job.argv)),
    )


def joined(head: Sequence[str], begin: Sequence[str], rest: Sequence[str]) -> str:
    """A whole script."""
    heard = "trap : USR1 # until there is somebody to hear it"
    return "\n".join(["#!/bin/bash", *head, "", heard, *begin, *rest]) + "\n"


def body(job: JobSpec, options: SlurmSection, words: Words, program: Sequence[str]) -> list[str]:
    """What a job's script does in the job's folder."""
    return [
        *_preparation(job, options, words),
        *program,
        *_program(job, options),
        *_supervision(words.number),
    ]


def mark(job_id: str, round_: int) -> str:
    """The comment of a job: by it a submission is found again."""
    return f"{MARK}{job_id}" + (f":{round_}" if round_ > 1 else "")


def directives(
    job: JobSpec, options: SlurmSection, names: Sequence[tuple[str, str]], wait: str | None
) -> list[str]:
    """The `#SBATCH` lines: its names, what any job like ``job`` needs, and what it waits for."""
    given = [*names, *_options(job, options, wait)]
    return [directive(name, value) for name, value in given] + [
        f"#SBATCH {_extra(one)}" for one in options.options
    ]


def _extra(given: str) -> str:
    name, equals, value = given.removeprefix("--").partition("=")
    return directive(name, value if equals else None).removeprefix("#SBATCH ")


def _options(
    job: JobSpec, options: SlurmSection, wait: str | None
) -> Iterator[tuple[str, str | None]]:
    yield "open-mode", "append"
    yield "requeue", None
    yield "signal", f"B:USR1@{job.grace_s}"
    yield from _resources(job, options)
    places = ("partition", "account", "qos", "constraint", "reservation")
    yield from ((name, value) for name in places if (value := getattr(options, name)))
    if options.exclusive:
        yield "exclusive", None
    if wait:
        yield "dependency", wait
        yield "kill-on-invalid-dep", "yes"


def _patterned(job: JobSpec) -> bool:
    """Whether Slurm would see patterns such as `%j` in the folder's own path: then the script opens its output."""
    return bool(set(job.folder) & set("%\\"))


def number(engine_id: str) -> str:
    """Slurm's number of a job out of our engine id, ``17@tickets-3fa2c1d4-04-train``."""
    return engine_id.partition("@")[0]


def _resources(job: JobSpec, options: SlurmSection) -> Iterator[tuple[str, str | None]]:
    need = job.resources
    yield "nodes", str(need.nodes)
    yield "ntasks-per-node", "1"
    yield "cpus-per-task", str(need.cpus)
    if need.memory_gib is not None:
        yield "mem", f"{round(need.memory_gib * 1024)}M"
    if need.gpus:
        kind = f":{options.gpu_type}" if options.gpu_type else ""
        yield "gres", f"{options.gres}{kind}:{need.gpus}"
    if need.time_limit_s is not None:
        yield "time", duration(need.time_limit_s)


def duration(seconds: int) -> str:
    """``days-hours:minutes:seconds``."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    day, hour = divmod(hours, 24)
    return f"{day}-{hour:02}:{minute:02}:{second:02}"


def _preparation(job: JobSpec, options: SlurmSection, words: Words) -> Iterator[str]:
    yield from _ending(words)
    if options.modules:
        yield "type module >/dev/null 2>&1 || . /etc/profile"
        yield "module purge"
        for module in options.modules:
            yield f"module load {word(module)} || ended 3"
    for line in options.setup:
        yield from (line.rstrip("\n"), 'rc=$?; ((rc == 0)) || ended "$rc"')
    yield from (export(name, value) for name, value in sorted(job.env.items()))
    yield from (_secret(name, place) for name, place in sorted(job.secrets.items()))
    yield f'export TOOLKIT_ENGINE_ID="{words.number}@{words.id}"'
    yield f'export TOOLKIT_START="{words.number}.${{SLURM_RESTART_COUNT:-0}}"'
    if job.resources.nodes > 1:
        yield 'first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'
        yield ADDRESS
        yield f'export TOOLKIT_RENDEZVOUS="${{address:-$first}}:$(({options.port} + SLURM_JOB_ID % 5000))"'


def _secret(name: str, reference: str) -> str:
    """Read when the job starts: what goes through sbatch lies on the controller's disk."""
    kind, _, path = reference.partition(":")
    if kind != "file" or not path.startswith(("/", "~/")):
        raise UsageError(
            f"secret {name}: Slurm has no place for secrets such as {reference!r}",
            f"put it into a file that only you can read: chmod 600 PATH; {name}: file:/PATH",
        )
    place = f'"$HOME"/{word(path[2:])}' if path.startswith("~") else word(path)
    return f'{variable(name)}="$(cat -- {place})" || ended 3; export {name}'


def _ending(words: Words) -> tuple[str, ...]:
    return (
        "ended() { # the last word of the script, kept for those who ask after Slurm forgot",
        '  local rc="${1:-$?}"',
        """  local form='{"job": "%s", "mark": "%s", "restarts": %d, "exit_code": %d}\\n'""",
        f'  local mark={words.mark} restarts="${{SLURM_RESTART_COUNT:-0}}"',
        f"""  printf "$form" "{words.number}" "$mark" "$restarts" "$rc" >.slurm.part""",
        f"  mv .slurm.part {ENDED}",
        '  exit "$rc"',
        "}",
    )


def _program(job: JobSpec, options: SlurmSection) -> Iterator[str]:
    box = options.container
    if box and box.engine == "apptainer":
        yield from array("box", _apptainer(box, job))
        yield 'program=("${box[@]}" "${program[@]}")'
    if (box and box.engine == "pyxis") or job.resources.nodes > 1:
        yield from array("step", _srun(box, job))
        yield 'program=("${step[@]}" "${program[@]}")'


def _srun(box: ContainerSection | None, job: JobSpec) -> Sequence[str]:
    """One task on each node. Those that others wait for get the grace before they are ended."""
    wanted = ["srun", "--mpi=none", "--export=ALL", f"--cpus-per-task={job.resources.cpus}"]
    wanted += ["--kill-on-bad-exit=0", f"--wait={job.grace_s}"]
    if box and box.engine == "pyxis":
        wanted.append(f"--container-image={box.image}")
        wanted.append(f"--container-mounts={','.join([_workspace(job), *box.mounts])}")
        wanted.extend(box.options)
    if job.resources.nodes > 1:
        wanted += ["bash", "-c", 'export TOOLKIT_NODE="$SLURM_NODEID"; exec "$@"', "node"]
    return wanted


def _apptainer(box: ContainerSection, job: JobSpec) -> Sequence[str]:
    gpus = ["--nv"] if job.resources.gpus else []
    mounts = [part for one in (_workspace(job), *box.mounts) for part in ("--bind", one)]
    return ["apptainer", "exec", *gpus, *mounts, *box.options, box.image]


def _workspace(job: JobSpec) -> str:
    """The workspace, three folders above the job's: it has the artifacts as well."""
    place = job.folder.rsplit("/", 3)[0] or "/"
    if set(place) & set(":,"):
        raise UsageError(
            f"the workspace {place} cannot be mounted into a container: its path has ':' or ','",
            "take another workspace, or a profile without a container",
        )
    return f"{place}:{place}"


def _supervision(number: str) -> Sequence[str]:
    """Start the program, pass signals on, wait for its true end; then end, or ask for another start.

    Slurm starts it again by itself when it took the place back (the job is COMPLETING then). Left to the script: an
    attempt that wants it, one that found another copy still running, one that SIGKILL ended, or USR1 or TERM before it
    could hear them; and one whose watcher on the node, slurmstepd, was killed: Slurm would call it RUNNING for ever,
    with the jobs after it waiting.
    The program itself counts the tries, and ends at once when it is done already.
    """
    return (
        """trap 'kill -USR1 "$child" 2>/dev/null' USR1 TERM""",
        '"${program[@]}" &',
        "child=$!",
        'wait "$child"',
        'while kill -0 "$child" 2>/dev/null; do wait "$child"; done # signals end wait, not the program',
        'wait "$child"',
        "rc=$?",
        "trap '' USR1 TERM",
        "watcher=\"$(awk '/^PPid:/ {print $2}' /proc/$$/status)\"",
        "alone=$((watcher != PPID)) again=0",
        "case $rc in",
        f"  {PREEMPTED} | {SECOND_COPY} | 137 | 138 | 143) again=1 ;;",
        "  0) again=$alone ;; # done: the next start ends at once",
        "esac",
        "if ((again || alone)) && [[ ! -e cancelled.json ]] &&",
        f"""  [[ "$(squeue -h -j "{number}" -o %T)" == RUNNING ]]; then""",
        f'  if ((again)); then scontrol requeue "{number}"; else scancel "{number}"; fi',
        "fi",
        'ended "$rc"',
    )
