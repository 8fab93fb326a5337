"""A rank of the real stage on a GPU that holds few sequences: the cause is injected, all else is real."""

import itertools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from toolkit.stages import __main__
from toolkit.train import sft

step = json.loads(Path(sys.argv[1]).read_text())
rank, holds = int(os.environ["RANK"]), step["holds"]
build, calls = sft.build_model, itertools.count()


def small(*args, **kwargs):
    model = build(*args, **kwargs)

    def check(_module, _args, given):
        if not model.training or next(calls) < holds["after"]:
            return
        if rank in holds["ranks"] and len(given["input_ids"]) > holds["most"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return model


sft.build_model = small
with Path(step["output"]).parent.joinpath("events.jsonl").open("a") as events:
    if rank == 0:
        __main__._events = lambda: events
    code = __main__.run_stage(step, rank, 2)
sys.exit(code)
