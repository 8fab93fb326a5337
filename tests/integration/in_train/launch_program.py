"""A rank without a model: it fails, dies or waits as its step file says."""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from toolkit.train.parallel.launch import leave_error

step = json.loads(Path(sys.argv[1]).read_text())
rank, state = int(os.environ["RANK"]), Path(step["state"])
act = step["acts"][rank]
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
(state / f"started-{rank}").write_text(os.environ["OMP_NUM_THREADS"])
if act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "fail":
    said = {"type": "DataError", "message": "row 7 is broken", "hint": "mend it", "exit_code": 1}
    leave_error(state, rank, 2, said)
    sys.exit(1)
if act == "wait":
    end = time.monotonic() + 30
    while not ended and time.monotonic() < end:
        time.sleep(0.05)
    said = {"type": "StepFailedError", "message": "asked to stop", "hint": None, "exit_code": 1}
    leave_error(state, rank, 2, said)
    sys.exit(1)
