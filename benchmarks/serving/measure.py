"""What is measured on a server that runs: levels of load, the front's cost, adapters swapped under load."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launch import BASE, HERE, Host, front, front_settings
from results import Results
from servers import BenchmarkError, Running, free_port, put_table, running

from toolkit.gateway.table import Route, Table, Target

SMALL = (128, 128)
"""Prompt and answer, tokens."""
LARGE = (512, 128)
SWAPS = 4


@dataclass
class Bench:
    """One part: where its numbers go and how long it may take.

    Attributes:
        room: Seconds left of the call's budget.
    """

    part: str
    results: Results
    host: Host
    folder: Path
    room: Callable[[], float]

    def take(self, name: str, seconds: float, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure once, unless it is there already or the budget does not hold it; keep it at once."""
        key = f"{self.part}/{name}"
        if key in self.results:
            return
        if self.room() < seconds:
            print(f"{key}: skipped, {self.room():.0f} s are left and it takes {seconds:.0f}")
            return
        try:
            value = measure()
        except BenchmarkError as error:
            self.failed(name, error)
            return
        self.results.add(key, value)
        print(f"{key}: {headline(value)}", flush=True)

    def failed(self, name: str, error: BenchmarkError) -> None:
        """Note it and go on."""
        print(f"{self.part}/{name}: FAILED: {error}", file=sys.stderr, flush=True)
        self.results.add(f"{self.part}/{name}/failed", {"error": str(error)})

    def load(
        self,
        url: str,
        models: Sequence[str],
        *,
        clients: int = 64,
        rounds: int = 6,
        size: tuple[int, int] = SMALL,
        seed: str = "0",
    ) -> dict[str, Any]:
        """One run of ``load.py``.

        Raises:
            BenchmarkError: A request failed.
        """
        process = start_load(
            url, models, clients=clients, rounds=rounds, size=size, seed=f"{self.part}/{seed}"
        )
        return finish_load(process)

    def levels(self, server: Running, *, repeats: int = 2, rounds: int = 6) -> None:
        """64 clients on the base, on one adapter and on all of them, in turn, so that drift meets all alike."""
        groups = model_groups(server)
        for number in range(repeats):
            for name, models in groups.items():
                ask = partial(self.load, server.url, models, rounds=rounds, seed=f"{name}{number}")
                self.take(f"{name}-64/{number}", 20, ask)

    def large(self, server: Running) -> None:
        """256 clients with longer prompts, once."""
        for name, models in model_groups(server).items():
            if name != "eight":
                ask = partial(self.load, server.url, models, clients=256, rounds=2, size=LARGE)
                self.take(f"{name}-256/0", 40, ask)

    def warm_up(self, server: Running) -> None:
        """Not measured: the first requests of each kind compile kernels and fill pools."""
        for models in model_groups(server).values():
            self.load(server.url, models, rounds=1, seed="warm-up")

    def swaps(self, server: Running) -> None:
        """Load a new adapter, ask it, unload it, while 32 streams run on the base and an adapter."""
        prefix = "/v1" if "vllm" in self.part else ""

        def once() -> dict[str, Any]:
            name, folder = "a8", self.host.models / "a8"
            asked = server.launch.adapters[0].replace("a0", name)
            models = [server.launch.base, server.launch.adapters[0]]
            streams = start_load(server.url, models, clients=32, rounds=8, size=SMALL, seed="swap")
            try:
                time.sleep(2)
                times = [swap(server, prefix, name, folder, asked) for _ in range(SWAPS)]
                running_still = streams.poll() is None
            finally:
                summary = finish_load(streams)
            return {"swaps": times, "streams": summary, "streams_lasted": running_still}

        self.take("swap", 25, once)

    def front(self, server: Running) -> None:
        """The same requests straight to the engine and through our front, in turn."""
        wanted = [f"front-{kind}/{n}" for kind in ("64", "one") for n in range(3)]
        if all(f"{self.part}/{name}" in self.results for name in wanted) or self.room() < 40:
            return
        port, control = free_port(), self.folder / "f.sock"
        settings = front_settings(self.folder, port, control)
        launch = front(self.host, self.part.partition("-")[0], settings)
        log = self.folder / f"{self.part}-front.log"
        try:
            with running(launch, port, log, timeout_s=60, health="/healthz") as ahead:
                put_table(control, table(server).to_json())
                self._compare(server, ahead)
        except BenchmarkError as error:
            self.failed("front", error)

    def _compare(self, server: Running, ahead: Running) -> None:
        base = server.launch.base
        self.load(ahead.url, [BASE], rounds=1, seed="warm-up")

        def both(number: int, given: dict[str, Any]) -> dict[str, Any]:
            return {
                "direct": self.load(server.url, [base], seed=f"front{number}d", **given),
                "front": self.load(ahead.url, [BASE], seed=f"front{number}f", **given),
            }

        many = {"clients": 64, "rounds": 5, "size": SMALL}
        single = {"clients": 1, "rounds": 150, "size": (16, 1)}
        for number in range(3):
            for kind, given in (("64", many), ("one", single)):
                self.take(f"front-{kind}/{number}", 20, partial(both, number, given))


def model_groups(server: Running) -> dict[str, list[str]]:
    """Who is asked: the base, one adapter, all adapters in turn."""
    groups = {"base": [server.launch.base]}
    if server.launch.adapters:
        groups |= {"one": [server.launch.adapters[0]], "eight": list(server.launch.adapters)}
    return groups


def swap(server: Running, prefix: str, name: str, folder: Path, asked: str) -> dict[str, float]:
    """Seconds to load an adapter, to its first answer, and to unload it."""
    marks = [time.monotonic()]
    server.post(f"{prefix}/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
    marks.append(time.monotonic())
    server.post(
        "/v1/completions", {"model": asked, "prompt": [500] * 16, "max_tokens": 1, "temperature": 0}
    )
    marks.append(time.monotonic())
    server.post(f"{prefix}/unload_lora_adapter", {"lora_name": name})
    marks.append(time.monotonic())
    names = ("load_s", "first_answer_s", "unload_s")
    spans = {n: round(b - a, 4) for n, a, b in zip(names, marks, marks[1:], strict=False)}
    return spans | {"total_s": round(marks[-1] - marks[0], 4)}


def table(server: Running) -> Table:
    """What the front is told: one public name, which it writes into another."""
    target = Target(server.launch.base, "base", "0" * 16)
    return Table(server.url, (Route(BASE, (target,)),), 4096, ready=True)


def start_load(
    url: str, models: Sequence[str], *, clients: int, rounds: int, size: tuple[int, int], seed: str
) -> subprocess.Popen[str]:
    """``load.py`` in a process of its own."""
    arguments = ["--url", url, "--clients", clients, "--rounds", rounds, "--seed", seed]
    arguments += ["--prompt-tokens", size[0], "--max-tokens", size[1]]
    named = [word for model in models for word in ("--model", model)]
    return subprocess.Popen(
        [sys.executable, str(HERE / "load.py"), *map(str, arguments), *named],
        stdout=subprocess.PIPE,
        text=True,
    )


def finish_load(process: subprocess.Popen[str], timeout_s: float = 180) -> dict[str, Any]:
    """Its summary.

    Raises:
        BenchmarkError: A request failed, or it took longer than ``timeout_s``.
    """
    try:
        text, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise BenchmarkError(f"load.py took more than {timeout_s:.0f} s") from None
    if process.returncode:
        raise BenchmarkError(f"requests failed: {text[-1500:]}")
    summary: dict[str, Any] = json.loads(text)
    return summary


def headline(value: dict[str, Any]) -> str:
    """The number that one looks for in a log."""
    if "swaps" in value:
        return f"swaps {[one['total_s'] for one in value['swaps']]} s"
    if "direct" in value:
        rates = [value[side]["tokens_per_s"] for side in ("direct", "front")]
        first = [value[side]["ttft_ms"]["p50"] for side in ("direct", "front")]
        return f"tokens/s {rates[0]} -> {rates[1]}, first token {first[0]} -> {first[1]} ms"
    if "tokens_per_s" in value:
        return f"{value['tokens_per_s']} tokens/s"
    return json.dumps(value)[:300]
