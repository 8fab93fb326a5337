"""Start an engine under its guard, wait until it is healthy, stop it: the only way that the toolkit runs an engine."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolkit.engines import (
    ENGINES,
    LOOPBACK,
    Command,
    Deployment,
    Engine,
    guard,
    orphans,
    ports,
)
from toolkit.engines.client import Client
from toolkit.engines.failures import last_lines
from toolkit.engines.phases import PhaseReader
from toolkit.environments import compiled
from toolkit.errors import EngineError, NotInstalledError
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Interpreter

Process = subprocess.Popen[bytes]
"""A guard and what it starts."""

OnPhase = Callable[[str, float], None]
"""Called twice a second while an engine starts, with the phase and the seconds since the start."""

VLLM_CPU_PLUGIN = Path(__file__).with_name("vllm_cpu_plugin")
"""See ``toolkit_vllm_cpu.py`` there."""
POLL_S = 0.5
STOPPED = (0, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a guard whose engine was told to stop."""
GRACE_S = 20.0
"""What running requests get when a server is stopped."""


@dataclass
class Server:
    """A healthy engine.

    Attributes:
        url: Base URL without ``/v1``.
        models: Name -> what a request writes as ``model``; the base first, then adapters.
        phases: Seconds spent in each phase of start-up, in order.
        pid: The guard, which ends with the engine; SIGTERM to it stops everything.
        started: Start time of the guard in clock ticks since boot: with ``pid`` it names the process for good.
    """

    url: str
    models: Mapping[str, str]
    phases: Mapping[str, float]
    pid: int
    started: int
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)
    engine: Engine = field(repr=False)

    @property
    def client(self) -> Client:
        """Talks to this server."""
        return Client(self.url)

    @property
    def model_name(self) -> str:
        """What a request writes as ``model`` to get the subject: the last adapter, or the only model."""
        return list(self.models.values())[-1]

    @property
    def start_seconds(self) -> float:
        """From the first process to healthy."""
        return sum(self.phases.values())

    def check(self) -> None:
        """Raise :class:`EngineError` with the cause when the engine has ended."""
        code = self.process.poll()
        if code is not None:
            raise _died(self.engine, self.log, code, "ended while it served")

    def check_ended(self) -> None:
        """Raise :class:`EngineError` with the cause unless the engine ended because it was told to."""
        if self.process.poll() not in STOPPED:
            self.check()

    def wait(self) -> int:
        """Wait until the engine ends; return its exit code."""
        while True:
            # In slices: a signal that another thread received is handled only when this one wakes.
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=0.5)

    def detach(self) -> None:
        """Let the server outlive this process."""
        assert self.process.stdin is not None  # noqa: S101 - made by start()
        self.process.stdin.write(b"d")
        self.process.stdin.close()


@contextlib.contextmanager
def running(
    engine: str,
    interpreter: Interpreter,
    model: Path,
    adapters: Mapping[str, Path],
    serve: ServeSection,
    *,
    name: str,
    max_length: int,
    device: str,
    log: Path,
    on_phase: OnPhase | None = None,
    draft: Path | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Server]:
    """A healthy server for as long as the block runs; nothing of it is left afterwards, however the block ends.

    Args:
        engine: ``vllm`` or ``sglang``.
        interpreter: The Python of the engine's environment.
        model: Folder of the base or of a complete model.
        adapters: Model name -> PEFT adapter folder, loaded beside it.
        serve: Port, timeouts, memory.
        name: What clients ask for; the base under an adapter is ``NAME-base``.
        max_length: Longest context in tokens.
        device: ``cpu`` or ``cuda``.
        log: File for everything the engine prints; its folder exists.
        on_phase: Told what start-up is doing.
        draft: Folder of ``serve.speculative.model``; see :func:`toolkit.engines.draft_folder`.
        trust_remote_code: Let the engine run Python code that lies in ``model``.

    Raises:
        EngineError: The engine did not start; the cause and the advice are in it.
    """
    deployment = Deployment.read(
        model,
        adapters,
        serve,
        name=name,
        max_length=max_length,
        device=device,
        draft=draft,
        trust_remote_code=trust_remote_code,
    )
    with started(engine, interpreter, deployment, log, on_phase) as server:
        try:
            yield server
        finally:
            stop(server.process)


@contextlib.contextmanager
def started(
    engine: str,
    interpreter: Interpreter,
    deployment: Deployment,
    log: Path,
    on_phase: OnPhase | None = None,
) -> Iterator[Server]:
    """A healthy server, stopped only when the block raises: for a server that may be detached."""
    kind: Engine = ENGINES[engine]()
    orphans.reap()
    with ports.held(deployment.serve.port) as port:
        process = _spawn(kind, interpreter, deployment, port, log)
        try:
            client, phases = Client(f"http://{LOOPBACK}:{port}"), PhaseReader(kind.phases, log)
            _await_health(kind, deployment, process, client, phases, on_phase or (lambda *_: None))
            yield _server(kind, deployment, process, client, phases)
        except BaseException:
            stop(process, hurry=True)
            raise


def stop(process: subprocess.Popen[bytes], *, hurry: bool = False) -> None:
    """End a guard and everything below it. ``hurry`` leaves running requests no time."""
    try:
        if not hurry and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(GRACE_S + guard.HURRIED_S + 5)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass  # asked twice: the closed pipe below does not wait for requests
    finally:
        if process.stdin:
            process.stdin.close()
        try:
            process.wait(guard.HURRIED_S + 10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        orphans.reap()


def _spawn(
    engine: Engine, interpreter: Interpreter, deployment: Deployment, port: int, log: Path
) -> subprocess.Popen[bytes]:
    command = engine.command(interpreter.python, deployment, port)
    if not Path(command.argv[0]).exists():
        raise NotInstalledError(
            f"{engine.name} has no interpreter at {command.argv[0]}", "toolkit env sync"
        )
    return guarded(command.argv, _environ(engine, interpreter, deployment, command), log)


def guarded(argv: Sequence[str], environ: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a program under a guard; end it with :func:`stop`, or by ending this process."""
    options = ["--grace", str(GRACE_S), "--records", str(orphans.records_folder())]
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, *options, "--", *argv],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )


def _environ(
    engine: Engine, interpreter: Interpreter, deployment: Deployment, command: Command
) -> dict[str, str]:
    """The engine's environment, compile caches included where the user set none.

    vLLM on a CPU also finds our plugin, which acts only where a kernel is missing.
    """
    if (engine.name, deployment.device) == ("vllm", "cpu"):
        interpreter = replace(interpreter, pythonpath=(*interpreter.pythonpath, VLLM_CPU_PLUGIN))
    folder = compiled.folder(interpreter)
    caches = engine.caches(folder) if folder else {}
    return command.environ({**caches, **interpreter.environ()})


def _server(
    engine: Engine,
    deployment: Deployment,
    process: subprocess.Popen[bytes],
    client: Client,
    phases: PhaseReader,
) -> Server:
    names = [None, *(adapter.name for adapter in deployment.adapters)]
    models = {name or deployment.base_name: engine.model_id(deployment, name) for name in names}
    born = guard.start_time(process.pid)
    if born is None:
        raise _died(engine, phases.log, process.wait(), "ended as soon as it was healthy")
    return Server(
        client.root, models, phases.seconds(), process.pid, born, phases.log, process, engine
    )


def _await_health(  # noqa: PLR0917 - all of them are different things
    engine: Engine,
    deployment: Deployment,
    process: subprocess.Popen[bytes],
    client: Client,
    phases: PhaseReader,
    on_phase: OnPhase,
) -> None:
    """Return when the engine is healthy and ours."""
    timeout = deployment.serve.start_timeout_s
    while not client.healthy():
        phases.update()
        on_phase(phases.current, phases.total)
        if (code := process.poll()) is not None:
            raise _died(engine, phases.log, code, f"ended during start-up ({phases.current})")
        if phases.total > timeout:
            raise _too_slow(engine, phases.log, timeout, phases.current)
        time.sleep(POLL_S)
    phases.update()
    names = client.models()
    if deployment.base_name not in names:
        raise EngineError(
            f"{client.root} serves {', '.join(names)}, not {deployment.base_name}: another server answers there",
            "choose another port with --set serve.port=N",
        )


def _died(engine: Engine, log: Path, code: int, how: str) -> EngineError:
    return _failed(engine, log, f"{how} with exit code {code}", "")


def _too_slow(engine: Engine, log: Path, timeout: int, phase: str) -> EngineError:
    how = f"was not healthy after {timeout} s (phase: {phase})"
    return _failed(engine, log, how, "raise serve.start_timeout_s if the machine is slow; ")


def _failed(engine: Engine, log: Path, how: str, advice: str) -> EngineError:
    """With the cause where the log is understood, and its end where not."""
    text = log.read_text(errors="replace")
    reason = engine.explain(text)
    shown = f"\n{last_lines(text)}" if reason is None else f": {reason}"
    return EngineError(f"{engine.name} {how}{shown}", f"{advice}the whole log is {log}")
