"""The model card of an exported folder: made from what the run knows, nothing typed twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

Format = Literal["adapter", "merged"]

METHODS = {
    "lora": "LoRA (arXiv:2106.09685)",
    "qlora": "QLoRA on an NF4 base with double quantization (arXiv:2305.14314)",
    "full": "all weights",
}
OBJECTIVES = {
    "dpo": "DPO, better answers over worse ones (arXiv:2305.18290)",
    "kto": "KTO, answers marked good or bad (arXiv:2402.01306)",
    "orpo": "ORPO, better answers over worse ones (arXiv:2403.07691)",
    "grpo": "GRPO, answers of its own rated by functions (arXiv:2402.03300)",
}
STARTS = {
    "pissa": "PiSSA (arXiv:2404.02948)",
    "loftq": "LoftQ in one round (arXiv:2310.08659)",
}
NUMBERS = {
    "final_loss": "training loss of the last step",
    "heldout_loss": "held-out loss",
    "rewards_margins": "margin of the better answers in the last step",
    "heldout_rewards_accuracies": "held-out pairs of which the better answer is preferred",
    "reward": "mean reward of the answers of the last step",
    "steps": "optimizer steps",
    "rows_seen": "rows seen",
    "trained_tokens": "trained tokens",
    "merge_error": "largest logit difference, adapter to merged, float32",
    "stored_error": "largest logit difference after storing",
    "conversion_error": "largest logit difference, trained model to converted adapter, float32",
    "conversion_tolerance": "what that may be",
}


def model_card(
    form: Format,
    dtype: str,
    facts: Mapping[str, Any],
    numbers: Mapping[str, float],
    recipe: Mapping[str, object],
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        form: What the folder holds.
        dtype: Type of the stored weights.
        facts: Facts of the train artifact.
        numbers: Metrics of training and merging; those of :data:`NUMBERS` are shown.
        recipe: Recipe values to state, shown as they are; ``recipe`` becomes the title.
    """
    title = str(recipe.get("recipe", f"{facts.get('base', 'base')}, fine-tuned"))
    parts = [_front_matter(form, facts), f"# {title}\n", _what(form, dtype, facts)]
    if form == "adapter" and not facts.get("dora"):
        parts.append(_serving(title))
    parts.append("## Training\n\n" + _table(_training(facts)))
    shown = {label: f"{numbers[key]:.6g}" for key, label in NUMBERS.items() if key in numbers}
    if shown:
        parts.append("## Numbers of the run\n\n" + _table(shown))
    rest = {key: value for key, value in recipe.items() if key != "recipe" and value is not None}
    if rest:
        parts.append("## Recipe\n\n" + _table({key: _plain(value) for key, value in rest.items()}))
    return "\n".join(parts)


def _front_matter(form: Format, facts: Mapping[str, Any]) -> str:
    lines = ["---"]
    if facts.get("base"):
        lines.append(f"base_model: {json.dumps(facts['base'])}")  # a JSON string is a YAML string
    lines += [
        f"library_name: {'peft' if form == 'adapter' else 'transformers'}",
        "pipeline_tag: text-generation",
        f"tags: [{'lora' if form == 'adapter' else 'fine-tuned'}]",
        "---\n",
    ]
    return "\n".join(lines)


def _what(form: Format, dtype: str, facts: Mapping[str, Any]) -> str:
    base = f"`{facts.get('base', 'its base')}`"
    if form == "adapter":
        held = f"A LoRA adapter of rank {facts.get('rank')} for {base}.{_bound_to(facts)}"
    elif facts.get("method") == "full":
        held = f"{base} with all weights fine-tuned, stored as {dtype}."
    else:
        rounded = {"nf4": "the dequantized 4-bit weights", "fp8": "the weights, rounded to FP8,"}
        into = rounded.get(str(facts.get("trained_on")), "the weights")
        how = f"merged into {into} that training saw, in float32, stored as {dtype}"
        held = f"{base} with its adapter {how}."
    return f"{held}\nThe chat template in this folder is the one it was trained with.\n"


def _bound_to(facts: Mapping[str, Any]) -> str:
    """What more than a base this adapter needs, or needed until it was converted."""
    if facts.get("dora"):
        return " It uses DoRA: PEFT loads it, vLLM and SGLang do not; serve the merged model there."
    if facts.get("converted_from"):
        return (
            f" It was started with {facts['converted_from']}, and made a plain adapter for the base "
            "as it was: the function is the same, the rank twice that of training."
        )
    if facts.get("init") == "loftq":
        return (
            " It was started with LoftQ and corrects the base in 4-bit NF4 (bitsandbytes, double "
            "quantization): load it on that, not on the base in full precision."
        )
    return ""


def _serving(title: str) -> str:
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in title)
    return (
        "## Serving\n\nWith vLLM, without merging (`BASE` is the base model's folder or id):\n\n"
        "```\n"
        f"vllm serve BASE --enable-lora --max-lora-rank RANK --lora-modules {name}=FOLDER \\\n"
        "  --chat-template FOLDER/chat_template.jinja\n"
        "```\n"
        "RANK is the adapter's rank, rounded up to one that vLLM has (8, 16, 32, 64, 128, 256).\n"
    )


def _training(facts: Mapping[str, Any]) -> dict[str, str]:
    rows = {
        "method": METHODS.get(str(facts.get("method")), str(facts.get("method"))),
        "objective": OBJECTIVES.get(str(facts.get("objective"))),
        "base": facts.get("base"),
        "base fingerprint": facts.get("base_fingerprint"),
        "base as trained on": facts.get("trained_on"),
        "rank": facts.get("rank"),
        "alpha": facts.get("alpha"),
        "variants": _variants(facts) or None,
        "layers": facts.get("targets"),
        "longest sequence": facts.get("max_length"),
        "order of rows, sha256": facts.get("row_order"),
    }
    return {key: _plain(value) for key, value in rows.items() if value is not None}


def _variants(facts: Mapping[str, Any]) -> list[str]:
    start = str(facts.get("init", "default"))
    family = start.partition("_")[0]
    ratio = facts.get("plus_ratio")
    named = {
        "rsLoRA (arXiv:2312.03732)": facts.get("rslora"),
        "DoRA (arXiv:2402.09353)": facts.get("dora"),
        f"{STARTS.get(family)}, {start}": start != "default",
        f"LoRA+ (arXiv:2402.12354), ratio {ratio}": ratio,
    }
    return [name for name, is_so in named.items() if is_so]


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _table(rows: Mapping[str, str]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return "\n".join(lines) + "\n"
