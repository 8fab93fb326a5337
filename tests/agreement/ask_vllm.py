"""Gives adapters and quantized bases to a real vLLM in this process, and writes what it did.

Run by the interpreter of a vLLM environment: ``python ask_vllm.py JOB.json``; imports nothing of the toolkit.
The job names a base folder, adapter folders, configs of quantized bases, and the file for the answers.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # refusals are raised here
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SLOT_RANK = 64
PROMPT = [1, 17, 42, 99, 300, 7, 7, 250]
NOISE = 1e-3
"""Logprobs of one prompt differ by less than this between two runs of one engine."""


def main(job: dict) -> None:
    """Ask, and write the answers after each part, so that a part that dies does not lose the others."""
    answers = {"version": None, "adapters": {}, "bases": {}, "seconds": {}}
    import vllm

    answers["version"] = vllm.__version__
    start = time.monotonic()
    llm = vllm.LLM(
        model=job["base"],
        enable_lora=True,
        max_loras=2,
        max_lora_rank=SLOT_RANK,
        **job["options"],
    )
    answers["seconds"]["start"] = round(time.monotonic() - start, 1)
    base = logprobs(vllm, llm, None)
    drift = difference(base, logprobs(vllm, llm, None))
    answers["noise"] = drift
    for number, (name, folder) in enumerate(job["adapters"].items(), 1):
        answers["adapters"][name] = asked(vllm, llm, number, folder, (base, drift))
    answers["seconds"]["adapters"] = round(time.monotonic() - start, 1)
    Path(job["answers"]).write_text(json.dumps(answers))
    for name, given in job["bases"].items():
        answers["bases"][name] = loads(llm, given["folder"], given["max_length"])
    answers["seconds"]["bases"] = round(time.monotonic() - start, 1)
    Path(job["answers"]).write_text(json.dumps(answers))
    if "on_packed" in job:
        answers["on_packed"] = on_packed(vllm, job)
        answers["seconds"]["on_packed"] = round(time.monotonic() - start, 1)
        Path(job["answers"]).write_text(json.dumps(answers))
    os._exit(0)  # an engine in this process takes its time to end, and may never


def loads(llm, folder: str, max_length: int) -> dict:
    """Whether vLLM takes a base: its configuration, and a linear layer of it with the kernel that would run it."""
    from vllm.engine.arg_utils import EngineArgs

    config = json.loads((Path(folder) / "config.json").read_text())
    try:
        arguments = EngineArgs(model=folder, max_model_len=max_length, skip_tokenizer_init=True)
        made = arguments.create_engine_config()
        if made.quant_config is not None:
            linear(llm, made.quant_config, config["intermediate_size"])
    except Exception as error:  # noqa: BLE001 - whatever the engine raises is its answer
        return {"does": "refuses", "why": f"{type(error).__name__}: {error}"[:600]}
    return {"does": "loads", "why": ""}


def linear(llm, quantization, width: int) -> None:
    """Make one layer; its kernel is chosen there."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import ReplicatedLinear

    with set_current_vllm_config(llm.llm_engine.vllm_config):
        ReplicatedLinear(
            width,
            width,
            bias=False,
            quant_config=quantization,
            params_dtype=torch.bfloat16,
            prefix="model.layers.0.mlp.down_proj",
        )


def asked(vllm, llm, number: int, folder: str, plain: tuple[list[float], float]) -> dict:
    """Load one adapter, ask with it, forget it; ``plain`` is the base's answer and its noise."""
    base, noise = plain
    from vllm.lora.request import LoRARequest

    request = LoRARequest(f"a{number}", number, folder)
    try:
        llm.llm_engine.add_lora(request)
    except Exception as error:  # noqa: BLE001 - whatever the engine raises is its answer
        forget(llm, number)
        return {"does": "refuses", "why": f"{type(error).__name__}: {error}"[:600]}
    try:
        changed = difference(base, logprobs(vllm, llm, request))
    except Exception as error:  # noqa: BLE001 - whatever the engine raises is its answer
        return {"does": "dies", "why": f"{type(error).__name__}: {error}"[:600]}
    forget(llm, number)
    return {
        "does": "changes" if changed > max(NOISE, 3 * noise) else "ignores",
        "why": f"{changed:.6f}",
    }


def on_packed(vllm, job: dict) -> dict:
    """By format: how far an adapter on 4-bit weights is from it on the same weights unpacked, and its change; nats."""
    import packed
    from vllm.lora.request import LoRARequest

    sys.path.append(job["plugin"])  # not before: the fixtures are given to vLLM as it is
    import toolkit_vllm_cpu

    toolkit_vllm_cpu.register()
    request = LoRARequest("a", 1, job["on_packed"])
    said, found = {}, {}
    options = job["options"] | {"dtype": "bfloat16"}  # vLLM takes GPTQ and AWQ in 16 bits only
    folders = packed.write(Path(job["base"]), Path(job["answers"]).with_name("on_packed"))
    more = (
        ("bnb",) if job.get("bnb") else ()
    )  # made by the engine itself, of the weights as they are
    for name in ("unpacked", *(name for name in folders if name != "unpacked"), *more):
        given = {"quantization": "bitsandbytes"} if name == "bnb" else {}
        try:
            llm = vllm.LLM(
                model=str(folders.get(name, folders["unpacked"])),
                enable_lora=True,
                max_lora_rank=SLOT_RANK,
                **options | given,
            )
            said[name] = [logprobs(vllm, llm, asked) for asked in (None, request)]
            del llm
        except Exception as error:  # noqa: BLE001 - whatever the engine raises is its answer
            found[name] = {"why": f"{type(error).__name__}: {error}"[:600]}
            continue
        pairs = zip(said[name], said["unpacked"], strict=True)
        base, adapter = (difference(*pair) for pair in pairs)
        found[name] = {"base": base, "adapter": adapter, "change": difference(*said[name])}
    return found


def forget(llm, number: int) -> None:
    """What was half loaded must not be in the way of the next."""
    try:
        llm.llm_engine.remove_lora(number)
    except Exception as error:  # noqa: BLE001 - whatever the engine raises is its answer
        print("remove_lora:", error)


def logprobs(vllm, llm, request) -> list[float]:
    """Logprob of each token of the prompt."""
    parameters = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (out,) = llm.generate(
        [{"prompt_token_ids": PROMPT}], parameters, lora_request=request, use_tqdm=False
    )
    pairs = zip(PROMPT[1:], out.prompt_logprobs[1:], strict=True)
    return [at[token].logprob for token, at in pairs]


def difference(one: list[float], other: list[float]) -> float:
    """Largest difference, nats."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
