"""Gives adapters to a real SGLang, and writes what it did.

Run by the interpreter of an SGLang environment: ``python ask_sglang.py JOB.json``; imports nothing of the toolkit.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SLOT_RANK = 64
PROMPT = [1, 17, 42, 99, 300, 7, 7, 250]
NOISE = 1e-3


def main(job: dict) -> None:
    """Ask, and write after each answer: a scheduler that dies takes this process with it."""
    import sglang

    answers = {"version": sglang.__version__, "adapters": {}, "bases": {}, "seconds": {}}

    def keep() -> None:
        Path(job["answers"]).write_text(json.dumps(answers))

    start = time.monotonic()
    engine = sglang.Engine(
        model_path=job["base"],
        enable_lora=True,
        max_lora_rank=SLOT_RANK,
        lora_target_modules=["all"],
        max_loras_per_batch=2,
        **job["options"],
    )
    answers["seconds"]["start"] = round(time.monotonic() - start, 1)
    base = logprobs(engine, None)
    answers["noise"] = difference(base, logprobs(engine, None))
    keep()
    for name, folder in job["adapters"].items():
        answers["adapters"][name] = {"does": "dies", "why": "the engine ended here"}
        keep()
        answers["adapters"][name] = asked(engine, base, name, folder, answers["noise"])
        keep()
    answers["seconds"]["adapters"] = round(time.monotonic() - start, 1)
    keep()
    engine.shutdown()


def asked(engine, base, name: str, folder: str, noise: float) -> dict:
    """Load one adapter, ask with it, forget it."""
    called = name.replace(" ", "-")
    try:
        loaded = engine.load_lora_adapter(called, folder)
    except Exception as error:  # noqa: BLE001 - whatever the engine raises is its answer
        return {"does": "refuses", "why": f"{type(error).__name__}: {error}"[:600]}
    if not loaded.success:
        return {"does": "refuses", "why": str(loaded.error_message)[:600]}
    changed = difference(base, logprobs(engine, called))
    engine.unload_lora_adapter(called)
    does = "changes" if changed > max(NOISE, 3 * noise) else "ignores"
    return {"does": does, "why": f"{changed:.6f}"}


def logprobs(engine, adapter: str | None) -> list[float]:
    """Logprob of each token of the prompt."""
    out = engine.generate(
        input_ids=[PROMPT],
        sampling_params={"max_new_tokens": 1, "temperature": 0},
        return_logprob=True,
        logprob_start_len=0,
        lora_path=[adapter],
    )
    found = out[0]["meta_info"]["input_token_logprobs"]
    return [at[0] for at in found[1:]]


def difference(one: list[float], other: list[float]) -> float:
    """Largest difference, nats."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
