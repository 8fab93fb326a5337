"""A server of fake engines for tests of the supervision: started, asked, killed, and looked for afterwards."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from toolkit.engines import guard
from toolkit.recipe.serve import ServeSection
from toolkit.serving.control import request
from toolkit.serving.state import AdapterSpec, InterpreterSpec, ServerSpec
from toolkit.workspace import private_folder

ROOT = Path(__file__).parents[1]
PROGRAM = (sys.executable, str(ROOT / "tests" / "fake_serving.py"))
QUICK = {"shallow_s": 0.5, "slow_s": 1.0, "quiet_s": 2.0, "deep_s": 4.0, "stopped_s": 2.0}
PATIENCE_S = 60.0
"""For what takes a second on an idle machine: this one may be busy."""


def model(folder: Path) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def adapter(folder: Path, name: str = "tickets") -> AdapterSpec:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "adapter_config.json").write_text('{"r": 8, "peft_type": "LORA"}')
    return AdapterSpec(name, str(folder), "0123456789abcdef")


def spec(tmp_path: Path, *engine_args: str, adapters=(), router=None, name="m", **section):
    section = {"port": 0, "drain_s": 5, "extra_args": engine_args} | section
    return ServerSpec(
        name=name,
        subject="tuned" if adapters else "base",
        folder=str(private_folder(tmp_path / "servers" / name)),
        model=str(model(tmp_path / "model")),
        model_version="f" * 16,
        base_name=f"{name}-base" if adapters else name,
        max_length=4096,
        device="cpu",
        serve=ServeSection(**section).model_dump(mode="json"),
        engine=InterpreterSpec(sys.executable),
        router=InterpreterSpec(router) if router else None,
        adapters=tuple(adapters),
        tuning=QUICK,
    )


def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


class Supervised:
    """A supervisor process and its events."""

    def __init__(self, spec: ServerSpec, program: tuple[str, ...] = PROGRAM) -> None:
        self.spec = spec
        spec.write()
        self.log = (spec.place / "supervisor.log").open("wb")
        self.process = subprocess.Popen(
            [*program, spec.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, env=environ(), start_new_session=True,
        )  # fmt: skip
        self.events: list[dict] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def event(self, kind: str, patience_s: float = PATIENCE_S) -> dict:
        """The first event of a kind."""
        wait_for(lambda: any(e["event"] == kind for e in self.events) or self.ended, patience_s)
        found = [e for e in self.events if e["event"] == kind]
        assert found, f"no {kind}: {self.events[-5:]} {self.log_text()}"
        return found[0]

    def log_text(self) -> str:
        return (self.spec.place / "supervisor.log").read_text()[-3000:]

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None and not self._reader.is_alive()

    @property
    def url(self) -> str:
        return self._listening["url"]

    @property
    def control(self) -> Path:
        return Path(self._listening["control"])

    @functools.cached_property
    def _listening(self) -> dict:
        return self.event("listening")

    def status(self) -> dict:
        return request(self.control, "GET", "/status")

    def part(self, name: str) -> dict:
        return next(p for p in self.status()["parts"] if p["name"] == name)

    def ready(self) -> "Supervised":
        self.event("ready")
        return self

    @property
    def part_pids(self) -> dict[str, int]:
        """By the last event that told of parts: works when the supervisor is dead."""
        last = [e for e in self.events if e["event"] == "parts"][-1]
        return {part["name"]: part["pid"] for part in last["parts"]}

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        code = self.process.wait(patience_s)
        self._reader.join()
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def supervised(spec: ServerSpec):
    server = Supervised(spec)
    try:
        yield server
    finally:
        server.close()


def wait_for(said, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not said():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def get(url: str, timeout_s: float = 10) -> tuple[int, dict]:
    return _open(urllib.request.Request(url), timeout_s)


def ask(url: str, model: str = "m", timeout_s: float = 30, **values) -> tuple[int, dict]:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]} | values
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return _open(urllib.request.Request(f"{url}/v1/chat/completions", data, headers), timeout_s)


def _open(asked, timeout_s):
    """Status and JSON (or text); 0 where nothing listens."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=timeout_s) as answer:
            return answer.status, _json(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, _json(error.read())
    except OSError as error:
        return 0, {"error": repr(error)}


def _json(content: bytes):
    try:
        return json.loads(content)
    except ValueError:
        return {"text": content.decode()}


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def gone(pids) -> bool:
    return all(guard.start_time(pid) is None for pid in pids)
