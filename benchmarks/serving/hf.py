"""Transformers' own ``generate``: what people have before they have an engine. Prints one line of JSON.

Once on a batch, as if all clients had asked in the same moment, and once on one prompt after the other, which is what
clients get who ask when they like: ``generate`` takes nobody into a batch that runs.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any


def rounds(
    model: Any, batch: int, prompt_tokens: int, new_tokens: int, budget_s: float
) -> list[float]:
    """Seconds of each call after one warm-up call, at most three, fewer when the budget ends."""
    import torch

    taken: list[float] = []
    begin = time.monotonic()
    for number in range(4):
        ids = torch.randint(300, 40_000, (batch, prompt_tokens), device=model.device)
        start = time.monotonic()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if out.shape[1] != prompt_tokens + new_tokens:
            raise RuntimeError(f"{out.shape[1] - prompt_tokens} tokens came, not {new_tokens}")
        if number:
            taken.append(round(time.monotonic() - start, 3))
        if taken and time.monotonic() - begin > budget_s:
            break
    return taken


def main() -> None:
    """Load, warm up, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--budget-s", type=float, default=60)
    options = parser.parse_args()
    import torch
    import transformers

    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, device_map=device
    )
    loaded = time.monotonic() - begin
    with torch.inference_mode():
        taken = rounds(
            model, options.batch, options.prompt_tokens, options.max_tokens, options.budget_s
        )
        alone = rounds(model, 1, options.prompt_tokens, options.max_tokens, options.budget_s / 4)
    tokens = options.batch * options.max_tokens
    result = {
        "batch": options.batch,
        "load_s": round(loaded, 1),
        "seconds": taken,
        "tokens_per_s": round(tokens * len(taken) / sum(taken), 1),
        "one_by_one": {
            "seconds": alone,
            "tokens_per_s": round(options.max_tokens * len(alone) / sum(alone), 1),
        },
        "attention": model.config._attn_implementation,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
