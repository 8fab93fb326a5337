"""What the runner of jobs adds to each step, on this machine.

    python benchmarks/jobs/overhead.py [--jobs 20] [--rounds 3]

A chain of jobs that do nothing (a Python that ends at once), against the same command started by hand. From the end
of one job to the end of the next lie: the shim writes its end, the keeper sees it, gives the next job its turn and a
place, starts its shim, and that starts the command. The keeper runs already; its own start is shown beside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.contract.world import World

COMMAND = (sys.executable, "-I", "-S", "-c", "")


def bare(count: int) -> list[float]:
    """Seconds of the command alone."""
    took = []
    for _ in range(count):
        begun = time.perf_counter()
        subprocess.run(COMMAND, check=True)
        took.append(time.perf_counter() - begun)
    return took


def as_jobs(world: World, count: int) -> list[float]:
    """Seconds from the end of a job to the end of the next one, over one chain."""
    chain = world.submit(*[COMMAND] * count)
    world.ended(chain, count, 600)
    ends = [report.ended for report in world.reports(chain)]
    return [after - before for before, after in pairwise(ends)]


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), "local", {"slots": 1, "folder": f"{folder}/places"})
        begun = time.perf_counter()
        world.ended(world.submit(COMMAND), 1, 600)
        first = time.perf_counter() - begun
        alone, jobs = [], []
        for _ in range(given.rounds):  # in turn, so that both meet the same machine
            alone += bare(given.jobs)
            jobs += as_jobs(world, given.jobs)
        world.close()
    added = statistics.median(jobs) - statistics.median(alone)
    told = {
        "cores": os.cpu_count(),
        "load": [round(one, 1) for one in os.getloadavg()],
        "command_s": _spread(alone),
        "step_s": _spread(jobs),
        "added_s": round(added, 3),
        "first_job_with_the_keepers_start_s": round(first, 2),
    }
    print(json.dumps(told, indent=1))


def _spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=10)
    named = {"median": statistics.median(values), "p90": cuts[-1], "most": max(values)}
    return {name: round(value, 3) for name, value in named.items()}


if __name__ == "__main__":
    main()
