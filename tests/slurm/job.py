"""A job's program for tests: says what it sees in ``said.jsonl`` of its folder, and does as it is told."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

told = []


def say(event, **more):
    line = json.dumps({"event": event, "at": time.time(), "pid": os.getpid(), **more}) + "\n"
    with Path("said.jsonl").open("a") as file:
        file.write(line)


def hear(number, _frame):
    told.append(number)
    say("told", signal=signal.Signals(number).name)


def main():
    if sys.argv[1:2] == ["--tell"]:
        say("tells", argv=sys.argv[2:], variables=dict(os.environ), folder=str(Path.cwd()))
        return 0
    parser = argparse.ArgumentParser()
    parser.add_argument("--exit", type=int, default=0)
    parser.add_argument("--sleep", type=float, default=0)
    parser.add_argument("--until-told", action="store_true")
    parser.add_argument("--child", action="store_true")
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hear)
    say("started", variables=dict(os.environ))
    if given.child:
        subprocess.Popen(["sleep", "1000"])
    first = not os.environ.get("SLURM_RESTART_COUNT")
    end = time.monotonic() + (1000 if given.until_told and first else given.sleep)
    while time.monotonic() < end and not told:
        time.sleep(0.1)
    if told:
        time.sleep(0.5)
        return 75
    say("ended")
    return given.exit


sys.exit(main())
