"""Load on an OpenAI endpoint from one process: N clients, each with one streaming completion in flight at a time.

Prompts are token ids, drawn anew for every request, so their length is exact and no prefix cache can answer them.
Tokens are what the engine's ``usage`` says, never counted by events. An event's time is taken when its bytes arrive,
before anything is parsed; only the last events of an answer are parsed at all.

    python3 benchmarks/serving/load.py --url http://127.0.0.1:8000 --model tuned --clients 64 --rounds 8
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

LOWEST_ID, HIGHEST_ID = 300, 40_000
"""Token ids of prompts: above the special and single-byte ones, inside every vocabulary that is measured."""
SILENCE_S = 300


@dataclass
class Sample:
    """One request; seconds since the load began, or since the request was sent."""

    model: str
    start: float
    ttft: float = 0.0
    e2e: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        return (self.e2e - self.ttft) / max(1, self.tokens - 1)


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank; 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def read_usage(stream: bytes) -> dict[str, int]:
    """The usage in the last events of an answer.

    Raises:
        ValueError: The stream ended early, held an error, or named no usage.
    """
    if b"data: [DONE]" not in stream:
        raise ValueError(
            f"the stream ended without [DONE]: {stream[-300:].decode(errors='replace')}"
        )
    for line in reversed(stream.split(b"\n")):
        if line.startswith(b"data: {") and b'"usage"' in line:
            usage: dict[str, int] | None = json.loads(line.removeprefix(b"data: ")).get("usage")
            if usage:
                return usage
    raise ValueError("the stream named no usage (stream_options.include_usage)")


async def ask(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], sample: Sample
) -> None:
    """Send one request and fill in its times; a failure is noted in the sample, not raised."""
    sent = time.perf_counter()
    arrivals: list[float] = []
    chunks: list[bytes] = []
    try:
        async with session.post(url, json=body) as answer:
            if answer.status != 200:
                raise ValueError(f"{answer.status}: {(await answer.text())[:300]}")
            async for chunk in answer.content.iter_any():
                arrivals.append(time.perf_counter())
                chunks.append(chunk)
        usage = read_usage(b"".join(chunks))
        sample.prompt_tokens, sample.tokens = usage["prompt_tokens"], usage["completion_tokens"]
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
        sample.error = f"{type(error).__name__}: {error}"[:400]
        return
    sample.ttft, sample.e2e = arrivals[0] - sent, time.perf_counter() - sent
    sample.gaps = [after - before for before, after in pairwise(arrivals)]


async def client(
    number: int, options: argparse.Namespace, session: aiohttp.ClientSession, begin: float
) -> list[Sample]:
    """Send this client's requests one after the other."""
    draw = random.Random(f"{options.seed}/{number}")
    model = options.model[number % len(options.model)]
    samples = []
    for _ in range(options.rounds):
        body = {
            "model": model,
            "prompt": [draw.randint(LOWEST_ID, HIGHEST_ID) for _ in range(options.prompt_tokens)],
            "max_tokens": options.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sample = Sample(model, time.perf_counter() - begin)
        await ask(session, f"{options.url}/v1/completions", body, sample)
        samples.append(sample)
    return samples


async def load(options: argparse.Namespace) -> tuple[float, list[Sample]]:
    """All clients together; (seconds from the first request to the last answer, samples)."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=SILENCE_S),
        headers=headers,
        read_bufsize=2**20,
    ) as session:
        begin = time.perf_counter()
        done = await asyncio.gather(
            *(client(number, options, session, begin) for number in range(options.clients))
        )
        return time.perf_counter() - begin, [sample for one in done for sample in one]


def summarize(options: argparse.Namespace, seconds: float, samples: list[Sample]) -> dict[str, Any]:
    """What a table needs: rates, and times in milliseconds."""
    good = [sample for sample in samples if sample.error is None]
    tokens = sum(sample.tokens for sample in good)
    spans = {
        "ttft_ms": [sample.ttft for sample in good],
        "tpot_ms": [sample.tpot for sample in good if sample.tokens > 1],
        "e2e_ms": [sample.e2e for sample in good],
        "gap_ms": [gap for sample in good for gap in sample.gaps],
    }
    return {
        "clients": options.clients,
        "rounds": options.rounds,
        "models": len(options.model),
        "seconds": round(seconds, 3),
        "requests": len(samples),
        "failed": len(samples) - len(good),
        "errors": sorted({sample.error for sample in samples if sample.error})[:3],
        "prompt_tokens": sum(sample.prompt_tokens for sample in good),
        "completion_tokens": tokens,
        "short_answers": sum(sample.tokens != options.max_tokens for sample in good),
        "tokens_per_s": round(tokens / seconds, 1),
        "requests_per_s": round(len(good) / seconds, 2),
    } | {name: spread([span * 1000 for span in values]) for name, values in spans.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile and the largest."""
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    found = {name: round(quantile(values, share), 3) for name, share in shares.items()}
    return found | {"max": round(max(values, default=0.0), 3)}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``--model`` may be given several times, clients take them in turn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", required=True, help="http://host:port, without /v1")
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8, help="requests of each client")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--api-key")
    parser.add_argument("--samples", type=Path, help="write every request here, one JSON a line")
    return parser.parse_args(arguments)


def main() -> None:
    """Print the summary as one line of JSON; exit code 1 when a request failed."""
    options = parse()
    try:
        import uvloop

        runner = uvloop.run
    except ImportError:  # the default loop is fast enough for some thousand events a second
        runner = asyncio.run
    seconds, samples = runner(load(options))
    if options.samples:
        rows = [
            {"model": s.model, "start": round(s.start, 4), "ttft": round(s.ttft, 5), "e2e": round(s.e2e, 5),
             "tokens": s.tokens, "error": s.error} for s in samples
        ]  # fmt: skip
        options.samples.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    summary = summarize(options, seconds, samples)
    print(json.dumps(summary))
    sys.exit(1 if summary["failed"] else 0)


if __name__ == "__main__":
    main()
