"""Serving measured on one GPU: both engines, 8B shape, bf16 and 4 bits, adapters, starts, the front, HF generate.

    python3 benchmarks/serving/run.py --models ~/models --out ~/results --cache ~/cache \\
        --vllm-site ~/site-vllm --front-site ~/site-front --only models,hf,vllm-bf16,vllm-bare,vllm-warm

Each measurement is written into OUT/results.json the moment it is taken; a second call with the same OUT takes only
what is missing, and starts no server whose measurements are all there. ``--budget-s`` is what the call may take: what
does not fit is skipped and named. ``report.py`` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

PARTS = (
    "models", "hf", "tune",
    "vllm-bf16", "vllm-bare", "vllm-warm", "vllm-w4a16", "vllm-w4a16-bare",
    "sglang-bf16", "sglang-bare", "sglang-warm", "sglang-w4a16", "sglang-w4a16-bare",
)  # fmt: skip
VARIED = ("vllm-variant-", "vllm-cold-", "vllm-start-")
"""With a name from ``variants.py``: measured as a whole, started with empty caches, started with full ones."""
START_S = {"cold": 120, "warm": 60}
"""What a start is expected to take; a part that has less left is not begun."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="folder for the made models")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and logs/")
    parser.add_argument(
        "--cache", type=Path, required=True, help="compile caches; emptied before a cold start"
    )
    parser.add_argument("--vllm-site", type=Path, help="folder of vLLM's packages")
    parser.add_argument("--sglang-site", type=Path, help="folder of SGLang's packages")
    parser.add_argument(
        "--front-site", type=Path, help="folder of the front's packages that the engine's lacks"
    )
    parser.add_argument("--only", help=f"parts, in this order: {', '.join((*PARTS, *VARIED))}NAME")
    parser.add_argument("--variant", help="names from variants.py, measured one after the other")
    parser.add_argument("--again", action="store_true", help="measure the named parts anew")
    parser.add_argument("--budget-s", type=float, default=570)
    parser.add_argument("--shape", choices=("8b", "tiny"), default="8b")
    parser.add_argument("--dry-run", action="store_true", help="print every command, start nothing")
    parser.add_argument(
        "--fake", action="store_true", help="a stand-in for the engines, where there is no GPU"
    )
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[str]:
    """Parts to do, in order."""
    named = options.only.split(",") if options.only else []
    named += [f"vllm-variant-{name}" for name in (options.variant or "").split(",") if name]
    for part in named or PARTS:
        if part not in PARTS and not part.startswith(VARIED):
            sys.exit(
                f"there is no part {part!r}; there are {', '.join(PARTS)} and vllm-variant-NAME"
            )
    return named or list(PARTS)


def main() -> None:
    """Do the parts one after the other; a failed one is noted and the next is done."""
    options = parse()
    for site in (options.front_site, options.vllm_site, options.sglang_site):
        if site:
            sys.path.append(str(site))  # pydantic, for the toolkit's own modules
    from launch import Host
    from results import Results

    sites = {"vllm": options.vllm_site, "sglang": options.sglang_site, "front": options.front_site}
    host = Host(options.models.absolute(), sites, options.cache.absolute(), options.fake)
    if options.dry_run:
        dry_run(options, host)
        return
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.budget_s
    results = Results(options.out / "results.json")
    for part in chosen(options):
        if options.again:
            results.forget(part)
        began = time.monotonic()
        do(part, options, host, results, lambda: end - time.monotonic())
        print(
            f"== {part}: {time.monotonic() - began:.0f} s, {end - time.monotonic():.0f} s left",
            flush=True,
        )


def do(part: str, options: argparse.Namespace, host, results, room: Callable[[], float]) -> None:  # noqa: ANN001
    """One part."""
    from measure import Bench

    bench = Bench(part, results, host, options.out / "logs", room)
    made = {"models": host.models / "complete", "tune": host.cache / "lora-kernels"}
    if part in made and not made[part].exists():
        results.forget(part)  # the results came from another machine, the files did not
    if part == "models":
        bench.take("made", 60, lambda: script("models.py", host.models, "--shape", options.shape,
                                              *(("--device", "cpu") if options.fake else ())))  # fmt: skip
    elif part == "hf":
        size = ("--batch", 4, "--max-tokens", 8) if options.fake else ()
        bench.take("generate", 60, lambda: script("hf.py", host.models / "base", *size))
    elif part == "tune":
        folder, env = host.cache / "lora-kernels", host.variables("vllm")
        bench.take("lora", 120, lambda: script("tune_lora.py", folder, env=env))
        if folder.exists():
            shutil.copytree(folder, options.out / "lora-kernels", dirs_exist_ok=True)
    else:
        serve(bench, part, options)


def script(name: str, *arguments: object, env: dict[str, str] | None = None) -> dict[str, object]:
    """Run one of the scripts beside this one; the JSON it prints last."""
    from servers import BenchmarkError

    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | (env or {})
    )
    if done.returncode:
        raise BenchmarkError(f"{name} ended with {done.returncode}")
    value: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return value


def command(part: str, host, port: int):  # noqa: ANN001, ANN201
    """How a part's server is started."""
    from launch import bare, ours
    from variants import VARIANTS

    engine, _, kind = part.partition("-")
    model = "w4a16" if kind.startswith("w4a16") else "base"
    if kind.endswith("bare"):
        return bare(host, engine, model, port)
    variant = VARIANTS[
        kind.partition("-")[2] if kind.startswith(("variant-", "start-", "cold-")) else "none"
    ]
    return ours(host, engine, model, port, adapters=8, variant=variant)


def serve(bench, part: str, options: argparse.Namespace) -> None:  # noqa: ANN001
    """Start one server, once, and measure all that is wanted of it."""
    from servers import BenchmarkError, await_free_gpu, free_port, running

    from toolkit.engines import ENGINES

    engine, _, kind = part.partition("-")
    cold = kind == "bf16" or kind.startswith("cold-")
    if done(part, kind, bench.results):
        return
    expected = START_S["warm" if only_starts(kind) and not cold else "cold"]
    if not options.fake and bench.room() < expected:
        print(f"{part}: not begun, {bench.room():.0f} s are left")
        return
    if cold and f"{part}/start" not in bench.results:
        shutil.rmtree(bench.host.cache / engine, ignore_errors=True)
    await_free_gpu()
    port = free_port()
    launch = command(part, bench.host, port)
    log = bench.folder / f"{part}.log"
    try:
        with running(
            launch, port, log, timeout_s=bench.room() - 15, phases=ENGINES[engine].phases
        ) as server:
            versions = versions_of(engine, options)
            start = {
                "seconds": server.seconds,
                "phases": dict(server.phases),
                "command": launch.shown(),
            }
            bench.take("start", 0, lambda: start | {"versions": versions})
            steps(bench, kind, server)
    except BenchmarkError as error:
        bench.failed("server", error)


def done(part: str, kind: str, results) -> bool:  # noqa: ANN001
    """Whether nothing is left to measure."""
    wanted = ["start"] if only_starts(kind) else ["start", "base-64/1"]
    if kind == "bf16":
        wanted = ["start", "eight-64/1", "front-64/2", "front-one/2", "swap", "one-256/0"]
    return all(f"{part}/{name}" in results for name in wanted)


def steps(bench, kind: str, server) -> None:  # noqa: ANN001
    """In order of importance: a budget that ends cuts the last."""
    if only_starts(kind):
        return
    bench.warm_up(server)
    bench.levels(server, repeats=1)
    if kind == "bf16":
        bench.swaps(server)
    bench.levels(server)
    if kind == "bf16":
        bench.front(server)
    if kind in ("bf16", "bare"):
        bench.large(server)


def only_starts(kind: str) -> bool:
    """Whether a part measures its start and nothing else."""
    return kind == "warm" or kind.startswith(("start-", "cold-"))


def versions_of(engine: str, options: argparse.Namespace) -> dict[str, str]:
    """Packages that decide the speed."""
    from results import installed

    site = options.vllm_site if engine == "vllm" else options.sglang_site
    names = (engine, "transformers", "compressed-tensors", "flashinfer-python", "triton", "torch")
    return installed([site], *names) if site else {}


def dry_run(options: argparse.Namespace, host) -> None:  # noqa: ANN001
    """Print what would be started; the toolkit reads the adapters' ranks, so the models have to be there."""
    for part in chosen(options):
        if part == "models":
            print(
                f"# {part}\n{sys.executable} {HERE / 'models.py'} {host.models} --shape {options.shape}"
            )
        elif part == "tune":
            print(
                f"# {part}\n{sys.executable} {HERE / 'tune_lora.py'} {host.cache / 'lora-kernels'}"
            )
        elif part == "hf":
            print(f"# {part}\n{sys.executable} {HERE / 'hf.py'} {host.models / 'base'}")
        else:
            print(f"# {part}\n{command(part, host, 8000).shown()}")


if __name__ == "__main__":
    main()
