"""The longest context that a base has, as each engine reads it from the config: they differ."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.preflight.base_facts import BaseFacts
from toolkit.preflight.facts import Facts
from toolkit.preflight.verdict import Finding, refuse, rule
from toolkit.preflight.versions import Version
from toolkit.recipe import Recipe

_SCALED_ALREADY = ("default", "su", "longrope", "llama3")
"""Kinds of RoPE whose factor no vLLM applies to ``max_position_embeddings``."""

_YARN = ("yarn", "deepseek_yarn", "deepseek_llama_scaling")


def positions(base: BaseFacts, engine: str | None, version: Version = ()) -> int | None:
    """Longest context in tokens that the engine allows; that of Transformers for ``None``.

    Sources: vLLM 0.32.0 and 0.26.0, config/model.py: _get_and_verify_max_len; SGLang 0.5.17,
    utils/hf_transformers/common.py: get_context_length.
    """
    longest = base.number("max_position_embeddings")
    if longest is None:
        return None
    if engine == "vllm":
        return _vllm(base, longest, version)
    if engine == "sglang":
        return _sglang(base, longest)
    return max(longest, _stretched(base, longest))


def _vllm(base: BaseFacts, longest: int, version: Version) -> int:
    if "gemma3" in str(base.config.get("model_type", "")):
        return longest
    if _kind(base) in _SCALED_ALREADY:
        return longest
    if _kind(base) in _YARN:  # from 0.32 on: the config is taken to name the stretched length
        return longest if version >= (0, 32) else _stretched(base, longest)
    return int(longest * _factor(base))


def _sglang(base: BaseFacts, longest: int) -> int:
    says_original = "original_max_position_embeddings" in base.rope
    return longest if says_original or _kind(base) == "llama3" else int(longest * _factor(base))


def _stretched(base: BaseFacts, longest: int) -> int:
    if _kind(base) != "yarn":
        return longest
    original = base.rope.get("original_max_position_embeddings") or longest
    return int(original * _factor(base))


def _kind(base: BaseFacts) -> str:
    return str(base.rope.get("rope_type", base.rope.get("type", "default")))


def _factor(base: BaseFacts) -> float:
    factor = base.rope.get("factor")
    return float(factor) if isinstance(factor, int | float) else 1.0


@rule(
    "model.max_length",
    "max_length fits into the positions of the base",
    "transformers: max_position_embeddings; vllm, config/model.py: _get_and_verify_max_len; "
    "sglang, utils/hf_transformers/common.py: get_context_length",
    "lower model.max_length, or give the base a config with the longer max_position_embeddings",
    ("vllm 0.32.0 cpu", "vllm 0.26.0 cuda"),
)
def max_length(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """The base was trained up to so many positions; engines disagree about YaRN."""
    if facts.base is None:
        return
    engine = facts.engine if recipe.serve else None
    most = positions(facts.base, engine, facts.engine_version)
    if most is None or recipe.model.max_length <= most:
        return
    fix = f"set model.max_length to {most} or less"
    elsewhere = positions(facts.base, None) or 0
    if recipe.model.max_length <= elsewhere:
        yield refuse(
            f"model.max_length is {recipe.model.max_length}, which YaRN allows, but "
            f"{facts.engine_name} takes {most} positions from this config",
            f"{fix}, or set max_position_embeddings to {elsewhere} in the base's config.json",
        )
        return
    yield refuse(
        f"model.max_length is {recipe.model.max_length}, but the base has {most} positions", fix
    )


RULES = (max_length,)
