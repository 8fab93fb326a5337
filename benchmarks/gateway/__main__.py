"""``python -m benchmarks.gateway [--seconds S] [--streams N] [--out FILE]``: overhead, throughput, streams held.

Each is measured against the same fake engine directly and through the front, in turns, so that what else the machine
does hits both. Everything is on loopback in three processes (engine, front, this client); the JSON says how busy the
machine was with other things.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks.gateway.client import Answer, Caller, ask, connect
from toolkit.gateway.settings import GatewaySettings
from toolkit.gateway.table import Route, Table, Target

Json = dict[str, Any]
Ports = dict[str, int]
TARGET = Target("bench@1a2b3c4d5e6f7081", "adapter", "1a2b3c4d5e6f7081", run_id="0" * 32)


class UnixConnection(http.client.HTTPConnection):
    """HTTP to a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("front")
        self.path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


@contextlib.contextmanager
def engine(interval_s: float) -> Iterator[int]:
    """A fake engine; gives its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gateway.engine", str(interval_s)], stdout=subprocess.PIPE
    )
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def front(engine_port: int, **section: Any) -> Iterator[tuple[int, psutil.Process]]:
    """A front before it; gives its port and process."""
    with tempfile.TemporaryDirectory(prefix="front-") as name:
        folder = Path(name)
        settings = GatewaySettings(
            name="bench",
            port=0,
            control=folder / "c",
            state_file=folder / "s",
            access_log=folder / "log",
            front=section,
        )
        (folder / "settings.json").write_text(settings.model_dump_json())
        process = subprocess.Popen(
            [sys.executable, "-m", "toolkit.gateway", str(folder / "settings.json")],
            stdin=subprocess.PIPE,
        )
        try:
            while not (folder / "s").exists():
                time.sleep(0.05)
                if process.poll() is not None:
                    raise SystemExit("the front did not start")
            table = Table(
                f"http://127.0.0.1:{engine_port}", (Route("bench", (TARGET,)),), 32768, ready=True
            )
            control = UnixConnection(str(folder / "c"))
            control.request("PUT", "/table", table.to_json())
            control.getresponse().read()
            control.close()
            yield json.loads((folder / "s").read_text())["port"], psutil.Process(process.pid)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()
            process.wait()
            process.stdin.close()


def spread(values: Sequence[float], scale: float = 1e3) -> Json:
    """Quantiles, in milliseconds."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * scale, 3)

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1), "n": len(ordered)}


async def latency(ports: Ports, rounds: int, *, stream: bool, tokens: int) -> Json:
    """One client, request by request in turns: what one request pays."""
    callers = {name: await connect(port) for name, port in ports.items()}
    requests = {name: ask(port, tokens=tokens, stream=stream) for name, port in ports.items()}
    found = {name: {"first": [], "last": []} for name in ports}
    for number in range(rounds + 20):
        for name, caller in callers.items():
            answer = await caller.call(requests[name])
            if not answer.ok:
                raise SystemExit(f"{name}: request failed")
            if number >= 20:
                found[name]["first"].append(answer.first)
                found[name]["last"].append(answer.last)
    for caller in callers.values():
        caller.transport.close()
    result = {
        f"{name}_{what}_ms": spread(times)
        for name, kinds in found.items()
        for what, times in kinds.items()
    }
    for what in ("first", "last"):
        paired = [f - d for f, d in zip(found["front"][what], found["direct"][what], strict=True)]
        result[f"overhead_{what}_ms_p50"] = spread(paired)["p50"]
        result[f"overhead_{what}_ms_of_p50s"] = round(
            result[f"front_{what}_ms"]["p50"] - result[f"direct_{what}_ms"]["p50"], 3
        )
        result[f"overhead_{what}_ms_of_p99s"] = round(
            result[f"front_{what}_ms"]["p99"] - result[f"direct_{what}_ms"]["p99"], 3
        )
    return result


async def load(
    port: int, streams: int, seconds: float, tokens: int
) -> tuple[float, list[Answer], int]:
    """So many clients, each asking again when it was answered; events per second, and what a request took."""
    callers = await asyncio.gather(*(connect(port) for _ in range(streams)))
    request = ask(port, tokens=tokens, stream=True)
    answers = []
    end = time.perf_counter() + seconds

    async def client(caller: Caller) -> None:
        while time.perf_counter() < end:
            answers.append(await caller.call(request))

    begun = time.perf_counter()
    await asyncio.gather(*(client(caller) for caller in callers))
    took = time.perf_counter() - begun
    for caller in callers:
        caller.transport.close()
    failed = sum(not a.ok or a.events != tokens for a in answers if a.events != tokens + 1)
    return sum(a.events for a in answers) / took, answers, failed


async def throughput(
    ports: Ports,
    front_process: psutil.Process,
    *,
    streams: int,
    seconds: float,
    rounds: int,
    tokens: int,
) -> Json:
    """Tokens per second directly and through the front, in turns."""
    rates = {name: [] for name in ports}
    first = {name: [] for name in ports}
    cpu: dict[str, list[float]] = {name: [] for name in ports}
    failed = 0
    for _ in range(rounds):
        for name, port in ports.items():
            before = sum(front_process.cpu_times()[:2])
            rate, answers, lost = await load(port, streams, seconds, tokens)
            cpu[name].append((sum(front_process.cpu_times()[:2]) - before) / seconds)
            rates[name].append(rate)
            first[name] += [a.first for a in answers]
            failed += lost
    direct, through = (statistics.median(rates[name]) for name in ("direct", "front"))
    ratios = [f / d for f, d in zip(rates["front"], rates["direct"], strict=True)]
    return {
        "streams": streams,
        "tokens_per_request": tokens,
        "direct_tokens_per_s": [round(r) for r in rates["direct"]],
        "front_tokens_per_s": [round(r) for r in rates["front"]],
        "loss_percent_of_medians": round(100 * (1 - through / direct), 2),
        "loss_percent_median_of_rounds": round(100 * (1 - statistics.median(ratios)), 2),
        "direct_first_ms": spread(first["direct"]),
        "front_first_ms": spread(first["front"]),
        "failed": failed,
        "front_cpu_cores": round(statistics.median(cpu["front"]), 2),
        "front_cpu_us_per_token": round(1e6 * statistics.median(cpu["front"]) / through, 1),
    }


async def held(
    port: int, process: psutil.Process, streams: int, seconds: float, interval_s: float
) -> Json:
    """So many streams open at once for so long; the front's memory meanwhile."""
    tokens = int(seconds / interval_s)
    samples, waves = [], []
    before = process.memory_info().rss

    async def watch() -> None:
        while True:
            samples.append(round(process.memory_info().rss / 2**20, 1))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    for _ in range(2):
        cpu = sum(process.cpu_times()[:2])
        begun = time.perf_counter()
        callers: list[Caller] = []
        for start in range(0, streams, 100):
            callers += await asyncio.gather(
                *(connect(port) for _ in range(start, min(start + 100, streams)))
            )
        request = ask(port, tokens=tokens, stream=True)
        answers = await asyncio.gather(*(caller.call(request) for caller in callers))
        took = time.perf_counter() - begun
        for caller in callers:
            caller.transport.close()
        gaps = [gap for answer in answers for gap in answer.gaps[1:]]
        waves.append(
            {
                "whole": sum(a.ok and a.events >= tokens for a in answers),
                "tokens_per_s": round(sum(a.events for a in answers) / took),
                "first_ms": spread([a.first for a in answers]),
                "between_events_ms": spread(gaps) if gaps else None,
                "front_cpu_cores": round((sum(process.cpu_times()[:2]) - cpu) / took, 2),
                "front_rss_mib_at_end": samples[-1],
            }
        )
        await asyncio.sleep(1)
    watching.cancel()
    full = samples[len(samples) // 4 :]
    return {
        "streams": streams,
        "interval_ms": interval_s * 1e3,
        "waves": waves,
        "rss_mib_before": round(before / 2**20, 1),
        "rss_mib": samples,
        "rss_mib_growth_in_last_three_quarters": round(full[-1] - full[0], 1),
    }


def machine(others: float) -> Json:
    """Where this was measured, and what else ran."""
    return {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "others_cpu_percent_before": others,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=8,
        help="of each round under load, and half of each wave held",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of throughput")
    parser.add_argument(
        "--requests", type=int, default=500, help="one after the other, for latency"
    )
    parser.add_argument("--streams", type=int, default=2000, help="held at once")
    parser.add_argument("--only", choices=["latency", "throughput", "held"], action="append")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    parts = given.only or ["latency", "throughput", "held"]
    result = {"machine": machine(psutil.cpu_percent(1.0))}
    if "latency" in parts:
        with engine(0) as e, front(e) as (f, _):
            ports = {"direct": e, "front": f}
            result["latency_whole"] = uvloop.run(
                latency(ports, given.requests, stream=False, tokens=64)
            )
            result["latency_stream"] = uvloop.run(
                latency(ports, given.requests, stream=True, tokens=16)
            )
    if "throughput" in parts:
        # 64 streams with a token every 10 ms each: 6,400 tokens a second, what one H100 gives for an 8B
        with engine(0.01) as e, front(e) as (f, process):
            ports = {"direct": e, "front": f}
            result["throughput_paced"] = uvloop.run(
                throughput(
                    ports,
                    process,
                    streams=64,
                    seconds=given.seconds,
                    rounds=given.rounds,
                    tokens=128,
                )
            )
        with engine(0) as e, front(e) as (f, process):
            ports = {"direct": e, "front": f}
            result["throughput_unpaced"] = uvloop.run(
                throughput(
                    ports, process, streams=64, seconds=given.seconds / 2, rounds=2, tokens=128
                )
            )
    if "held" in parts:
        with engine(0.25) as e, front(e) as (f, process):
            result["held"] = uvloop.run(held(f, process, given.streams, given.seconds * 2, 0.25))
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
