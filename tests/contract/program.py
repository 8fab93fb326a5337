"""What contract jobs do: ``python -I program.py VERB ARGUMENTS``; the standard library only."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def say(file, *words):
    """Write the words as a line of JSON: how they arrived."""
    with Path(file).open("a") as out:
        out.write(json.dumps(words) + "\n")


def count(folder, target, pause):
    """Count in a file, one at a time, as a training with checkpoints does; every start leaves its process id."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    say(folder / "starts", os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    state = Path(os.environ["TOOLKIT_ATTEMPT"]).parents[1] / "state"
    state.mkdir(exist_ok=True)
    file = state / "count"
    done = int(file.read_text()) if file.exists() else 0
    while done < int(target):
        time.sleep(float(pause))
        done += 1
        say(folder / "counted", done)
        part = file.with_suffix(".part")
        part.write_text(str(done))
        part.replace(file)
        print("counted", done, flush=True)
        if asked:
            sys.exit(143)


def family(folder, stubborn):
    """Start a child that starts a session of its own, and a grandchild; none of them hears SIGTERM."""
    folder = Path(folder)
    say(folder / "pids", os.getpid())
    if int(stubborn) < 2:
        child = [sys.executable, "-I", __file__, "family", str(folder), str(int(stubborn) + 1)]
        subprocess.Popen(child, start_new_session=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("family member", stubborn, flush=True)
    time.sleep(600)


def occupy(folder, seconds):
    """Note which GPUs it has from when to when."""
    begun = time.time()
    time.sleep(float(seconds))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    say(Path(folder) / "occupied", gpus, begun, time.time())


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    {"say": say, "count": count, "family": family, "occupy": occupy}[verb](*arguments)
