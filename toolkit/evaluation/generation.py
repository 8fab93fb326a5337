"""Greedy answers through Transformers, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    found = set(configured if isinstance(configured, list) else [configured]) | {
        tokenizer.eos_token_id
    }
    return sorted(token for token in found if token is not None)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    limits: Sequence[int],
    batch_size: int,
    on_token: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield (index of the prompt, answer) batch by batch.

    Args:
        model: In inference mode.
        tokenizer: Pads on the left.
        prompts: Token ids.
        limits: Most new tokens for each prompt.
        batch_size: Prompts decoded together; longest first, so that memory runs out at the start or never.
        on_token: Called with the number of tokens decoded in this batch: a long one moves too.
    """
    stops = stop_ids(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(limits[i] for i in batch)
        asked = [prompts[i] for i in batch]
        new = _decode(model, tokenizer, asked, stops, max_new_tokens=longest, on_token=on_token)
        for index, ids in zip(batch, new, strict=True):
            kept = _until_stop(ids[: limits[index]], stops)
            # The clean-up of old tokenizers would take spaces before punctuation away.
            yield (
                index,
                tokenizer.decode(
                    kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
                ),
            )


def _decode(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    stops: Sequence[int],
    *,
    max_new_tokens: int,
    on_token: Callable[[int], None] | None,
) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    inputs = tokenizer.pad(
        {"input_ids": list(prompts)}, padding_side="left", return_tensors="pt"
    ).to(model.device)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops),
        pad_token_id=tokenizer.pad_token_id,
    )
    asked = inputs["input_ids"].shape[1]

    def watch(ids: Any, _scores: Any, **_more: Any) -> Any:  # [batch, prompt + new]
        if on_token:
            on_token(ids.shape[1] - asked)
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    with torch.inference_mode():
        output = model.generate(
            **inputs, generation_config=settings, stopping_criteria=StoppingCriteriaList([watch])
        )
    return [list(row) for row in output[:, asked:].tolist()]


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    return next((ids[:place] for place, token in enumerate(ids) if token in stops), ids)
