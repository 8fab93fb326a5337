"""Rules on the adapter that this recipe trains: whether what leaves training is what an engine can serve."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.preflight.facts import Facts
from toolkit.preflight.features import Does, Row, row_of
from toolkit.preflight.verdict import Finding, refuse, rule, warn
from toolkit.recipe import Recipe
from toolkit.recipe.recipe import ON

NF4 = "{method: bnb, of: base}"


def _alone(recipe: Recipe, *, by_engine: bool) -> list[str]:
    """Where the recipe uses the trained adapter unmerged; ``by_engine``: only where an engine loads it."""
    scored = recipe.evaluate if recipe.evaluate and recipe.evaluate.of else None
    if by_engine and scored and not scored.needs_engine:
        scored = None
    used = [("serve.models", s) for s in recipe.served if recipe.serve]
    used += [("evaluate.of", s) for s in recipe.evaluated if scored]
    return [f"{key}: {s!r}" for key, s in used if s == "tuned" or s.startswith(ON)]


def _row(feature: str, facts: Facts) -> Row | None:
    row = row_of(feature, facts.engine, facts.engine_version)
    return None if row is None or row.does is Does.serves else row


def _does(row: Row) -> str:
    return "does not serve that" if row.does is Does.refuses else str(row.does)


@rule(
    "train.dora_served",
    "an adapter with DoRA is served merged",
    "features.py: dora; vllm, lora/peft_helper.py; sglang, lora/lora_manager.py",
    "serve 'merged', or train without DoRA",
    ("vllm 0.32.0 cpu", "vllm 0.26.0 cuda", "sglang 0.5.17 cuda"),
)
def dora_served(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """No engine of today computes the length of W + B A, which DoRA divides by."""
    row = _row("dora", facts)
    if (
        recipe.train is None
        or recipe.train.method == "full"
        or not recipe.train.lora.dora
        or not row
    ):
        return
    alone = _alone(recipe, by_engine=True)
    for where in alone:
        yield refuse(
            f"{where} is the adapter by itself; train.lora.dora is true, and {facts.engine_name} {_does(row)}",
            "write 'merged' there (without serve.models and evaluate.of that is what is taken), or "
            "set train.lora.dora: false",
            row.source,
        )
    if recipe.serve and not alone and "merged" in recipe.served:
        yield warn(
            f"train.lora.dora: the merged model is served, because {facts.engine_name} {_does(row)} unmerged",
            "leave it so, if no other adapter shall stand beside it; else train.lora.dora: false",
            row.source,
        )


@rule(
    "train.pissa_served",
    "an adapter that took a part of its base into itself is made a plain one",
    "features.py: init; the export stage compares both models in a forward pass (train/convert.py)",
    "count with twice the rank, or serve 'merged'",
)
def pissa_served(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """PiSSA trains on W - B0 A0; engines put adapters on W."""
    row = _row("init", facts)
    if recipe.train is None or not recipe.train.lora.is_pissa or not row:
        return
    lora = recipe.train.lora
    if recipe.serve and recipe.serves_trained_adapter:
        yield warn(
            f"train.lora.init: {lora.init!r} changes the base, and {facts.engine_name} {_does(row)} as it is: "
            f"export-adapter makes a plain adapter of rank {lora.served_rank} of it, and fails where that is "
            "not the trained model",
            f"leave it so, if slots of rank {lora.served_rank} fit; else lower train.lora.rank, or "
            "set serve.models: [merged]",
            row.source,
        )


@rule(
    "train.loftq_served",
    "an adapter of LoftQ stays on the 4-bit base that it corrects",
    "arXiv:2310.08659: B A starts as W - NF4(W); on W it would be added to weights that lack nothing",
    f"serve 'merged'; or quantize: [{NF4}] and serve 'tuned@bnb'",
)
def loftq_served(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """No plain adapter on the full-precision base is the same model: what NF4 loses has full rank."""
    if recipe.train is None or recipe.train.lora.init != "loftq":
        return
    fitting = {
        f"'{ON}{q.label}'"
        for q in recipe.quantize
        if (q.method, q.of, q.bits or 4) == ("bnb", "base", 4)
    }
    alone = _alone(recipe, by_engine=False)
    for where in alone:
        if where.partition(": ")[2] not in fitting:
            yield refuse(
                f"{where} puts the adapter onto other weights than the NF4 base that train.lora.init "
                "'loftq' made it for, and no plain adapter makes good for that",
                f"write 'merged' there; or quantize: [{NF4}], and 'tuned@bnb' where the engine has "
                "bitsandbytes",
            )
    if recipe.serve and not alone and "merged" in recipe.served:
        yield warn(
            "train.lora.init: an adapter of 'loftq' belongs to its NF4 base, so the merged model is served",
            f"leave it so; or quantize: [{NF4}] and serve 'tuned@bnb' to keep base and adapter apart",
        )


RULES = (dora_served, pissa_served, loftq_served)
