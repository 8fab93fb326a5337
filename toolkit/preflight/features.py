"""What an adapter may bring, and what each engine does with it: a table, each row with its source.

A row says what a version of an engine does with a feature when it is simply given the adapter.
The dangerous ones are not refusals but ``alters``: the engine loads the adapter and serves another
model than the trained one, without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from toolkit.preflight.adapter_facts import AdapterFacts
from toolkit.preflight.verdict import Outcome
from toolkit.preflight.versions import FOREVER, Version

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Initialisations that leave the base weights alone (vLLM 0.32.0, lora/peft_helper.py)."""

CLASSIFIER_HEADS = ("classifier", "score")

MERGE = "merge it into the base and serve the merged model without adapters"


class Does(StrEnum):
    """What an engine does with an adapter."""

    serves = "serves it right"
    refuses = "refuses to load it"
    alters = "loads it and serves another model than the trained one"
    ignores = "loads it and answers as the base"
    dies = "loads it, and the first request ends the engine"


@dataclass(frozen=True)
class Feature:
    """A property of an adapter that some engine cannot serve."""

    id: str
    found: Callable[[AdapterFacts], object]
    """Something to show, or nothing when the adapter does not have it."""
    message: str
    """After "the adapter ..."; ``{value}`` is what ``found`` gave."""


def _saved_modules(a: AdapterFacts) -> object:
    return [m for m in a.config.get("modules_to_save") or () if m not in CLASSIFIER_HEADS]


def _saved_head(a: AdapterFacts) -> object:
    return [m for m in a.config.get("modules_to_save") or () if m in CLASSIFIER_HEADS]


def _changed_base(a: AdapterFacts) -> object:
    init = a.config.get("init_lora_weights", True)
    return init if isinstance(init, str) and init.lower() not in PLAIN_INITS else None


def _bias(a: AdapterFacts) -> object:
    return a.config.get("bias") if a.config.get("bias", "none") not in ("none", None) else None


def _pattern(key: str, of: str) -> Callable[[AdapterFacts], object]:
    """A pattern that says nothing new changes nothing."""

    def found(a: AdapterFacts) -> object:
        values = (a.config.get(key) or {}).values()
        return sorted(set(map(str, values))) if set(values) - {a.config.get(of)} else None

    return found


def _regex_targets(a: AdapterFacts) -> object:
    targets = a.config.get("target_modules")
    return targets if isinstance(targets, str) and targets not in ("all", "all-linear") else None


def _query_without_value(a: AdapterFacts) -> object:
    return "q_proj" in a.targets and "v_proj" not in a.targets


def _attention_without_query(a: AdapterFacts) -> object:
    return sorted(a.targets & {"k_proj", "v_proj"}) if "q_proj" not in a.targets else None


def _up_without_gate(a: AdapterFacts) -> object:
    return "up_proj" in a.targets and "gate_proj" not in a.targets


def _config(key: str) -> Callable[[AdapterFacts], object]:
    return lambda a: a.config.get(key)


FEATURES: Mapping[str, Feature] = {
    f.id: f
    for f in (
        Feature("dora", _config("use_dora"), "uses DoRA"),
        Feature("modules_to_save", _saved_modules, "has whole layers in modules_to_save: {value}"),
        Feature("saved_head", _saved_head, "has a classification head in modules_to_save: {value}"),
        Feature("bias", _bias, "trains biases: bias {value!r}"),
        Feature("lora_bias", _config("lora_bias"), "has a bias in its LoRA layers (lora_bias)"),
        Feature(
            "init",
            _changed_base,
            "was started with init_lora_weights {value!r}, which changes the base weights",
        ),
        Feature(
            "alora",
            _config("alora_invocation_tokens"),
            "is an activated LoRA (alora_invocation_tokens)",
        ),
        Feature(
            "layer_replication",
            _config("layer_replication"),
            "replicates layers (layer_replication)",
        ),
        Feature("bdlora", _config("use_bdlora"), "is block-diagonal (use_bdlora)"),
        Feature("qalora", _config("use_qalora"), "is a QALoRA (use_qalora)"),
        Feature("kasa", _config("kasa_config"), "uses KaSA, which changes the base weights"),
        Feature("monteclora", _config("monteclora_config"), "uses MonteCLoRA"),
        Feature("arrow", _config("arrow_config"), "routes between adapters (arrow_config)"),
        Feature(
            "token_indices",
            _config("trainable_token_indices"),
            "trains single tokens' embeddings (trainable_token_indices)",
        ),
        Feature(
            "rank_pattern", _pattern("rank_pattern", "r"), "has a rank_pattern with ranks {value}"
        ),
        Feature(
            "alpha_pattern",
            _pattern("alpha_pattern", "lora_alpha"),
            "has an alpha_pattern with {value}",
        ),
        Feature("rslora", _config("use_rslora"), "uses rsLoRA (scale alpha / sqrt(rank))"),
        Feature("regex_targets", _regex_targets, "has a pattern as target_modules: {value!r}"),
        Feature("query_only", _query_without_value, "is on q_proj, but not on v_proj"),
        Feature("no_query", _attention_without_query, "is on {value}, but not on q_proj"),
        Feature("up_only", _up_without_gate, "is on up_proj, but not on gate_proj"),
    )
}
"""Every feature, in the order in which it is reported."""


@dataclass(frozen=True)
class Row:
    """What one engine does with a feature, from version ``since`` on and before ``until``."""

    feature: str
    engine: str
    does: Does
    source: str
    """File of the engine's source, or an issue."""
    since: Version = ()
    until: Version = FOREVER
    fix: str = MERGE
    tried: tuple[str, ...] = ()
    """Engines and versions on which a test sees it."""

    @property
    def outcome(self) -> Outcome:
        """Only what is served right is let through."""
        return Outcome.ok if self.does is Does.serves else Outcome.refuse


_HELPER = "vllm, lora/peft_helper.py: _validate_features"
_LEGAL = "vllm, lora/peft_helper.py: validate_legal"
_NAMES = "vllm, lora/utils.py: parse_fine_tuned_lora_name"
_OLD_HELPER = "vllm 0.26.0, lora/peft_helper.py does not read it"
_SGLANG = "sglang, lora/lora.py"
_POOL = "sglang, lora/mem_pool.py: load_lora_weight_to_buffer"
_CONFIG = "sglang, lora/lora_config.py reads r, lora_alpha, target_modules and use_dora only"

_32: Version = (0, 32)
_CPU, _GPU, _SG = "vllm 0.32.0 cpu", "vllm 0.26.0 cuda", "sglang 0.5.17 cuda"
_NEWER = f"serve it with vllm 0.32 or newer, or {MERGE}"
_CONVERT = f"convert it with PEFT's path_initial_model_for_weight_conversion, or {MERGE}"
_VLLM = f"set serve.engine: vllm, or {MERGE}"

_D = Does


def _both(feature: str, source: str, *, sglang: Row, fix: str = MERGE) -> tuple[Row, ...]:
    """A feature that every vLLM refuses."""
    vllm = Row(feature, "vllm", _D.refuses, source, fix=fix, tried=(_CPU, _GPU))
    return (vllm, sglang)


def _since_32(
    feature: str, before: Does, sglang: Does, *, fix: str = MERGE, tried: bool = True
) -> tuple[Row, ...]:
    """A feature that vLLM refuses from 0.32 on; before, it did not look."""
    return (
        Row(feature, "vllm", _D.refuses, _HELPER, since=_32, fix=fix, tried=(_CPU,)),
        Row(
            feature,
            "vllm",
            before,
            _OLD_HELPER,
            until=_32,
            fix=fix,
            tried=(_GPU,) if tried else (),
        ),
        Row(feature, "sglang", sglang, _CONFIG, fix=fix, tried=(_SG,) if tried else ()),
    )


ROWS: tuple[Row, ...] = (
    *_both(
        "dora",
        _HELPER,
        sglang=Row(
            "dora",
            "sglang",
            _D.refuses,
            "sglang, lora/lora_manager.py: validate_new_adapter",
            tried=(_SG,),
        ),
    ),
    *_both(
        "modules_to_save",
        _HELPER,
        sglang=Row("modules_to_save", "sglang", _D.alters, _CONFIG, tried=(_SG,)),
    ),
    Row("saved_head", "vllm", _D.refuses, _HELPER, until=_32, tried=(_GPU,)),
    *_both("bias", _LEGAL, sglang=Row("bias", "sglang", _D.alters, _CONFIG)),
    Row("lora_bias", "vllm", _D.refuses, _HELPER, since=_32, tried=(_CPU,)),
    Row("lora_bias", "vllm", _D.refuses, _NAMES, until=_32, tried=(_GPU,)),
    Row("lora_bias", "sglang", _D.dies, _POOL),
    *_since_32("init", _D.alters, _D.alters, fix=_CONVERT),
    *_since_32("alora", _D.alters, _D.alters),
    *_since_32("layer_replication", _D.alters, _D.alters, tried=False),
    *_since_32("bdlora", _D.alters, _D.dies, tried=False),
    *_since_32("qalora", _D.alters, _D.alters, tried=False),
    *(
        Row(feature, engine, does, source)
        for feature in ("kasa", "monteclora", "arrow")
        for engine, does, source in (
            ("vllm", _D.refuses, f"{_NAMES}: tensors that are no lora_A or lora_B"),
            ("sglang", _D.alters, _CONFIG),
        )
    ),
    *_both(
        "token_indices",
        _NAMES,
        sglang=Row("token_indices", "sglang", _D.alters, _CONFIG),
    ),
    Row(
        "rank_pattern",
        "vllm",
        _D.serves,
        "vllm 0.32.0, lora/peft_helper.py: get_rank_and_scaling",
        since=_32,
        tried=(_CPU,),
    ),
    Row("rank_pattern", "vllm", _D.alters, _OLD_HELPER, until=_32, fix=_NEWER, tried=(_GPU,)),
    Row("rank_pattern", "sglang", _D.dies, _POOL, fix=_NEWER),
    Row(
        "alpha_pattern",
        "vllm",
        _D.serves,
        "vllm 0.32.0, lora/peft_helper.py: get_rank_and_scaling",
        since=_32,
        tried=(_CPU,),
    ),
    Row("alpha_pattern", "vllm", _D.alters, _OLD_HELPER, until=_32, fix=_NEWER, tried=(_GPU,)),
    Row("alpha_pattern", "sglang", _D.alters, _SGLANG + ": scaling", fix=_NEWER, tried=(_SG,)),
    Row("rslora", "vllm", _D.serves, "vllm, lora/peft_helper.py: scaling", tried=(_CPU, _GPU)),
    Row("rslora", "sglang", _D.alters, "sglang#40835; lora/lora.py", fix=_VLLM, tried=(_SG,)),
    Row("regex_targets", "vllm", _D.serves, "vllm reads tensor names", tried=(_CPU, _GPU)),
    Row(
        "regex_targets",
        "sglang",
        _D.refuses,
        "sglang, lora/utils.py: get_normalized_target_modules",
        fix="write target_modules in adapter_config.json as a list of module names",
        tried=(_SG,),
    ),
    Row(
        "query_only",
        "sglang",
        _D.refuses,
        _SGLANG + ": normalize_qkv_proj",
        fix=_VLLM,
        tried=(_SG,),
    ),
    Row("no_query", "sglang", _D.dies, _SGLANG + ": normalize_qkv_proj", fix=_VLLM),
    Row("up_only", "sglang", _D.dies, _SGLANG + ": normalize_gate_up_proj", fix=_VLLM),
)
"""What engines do; a feature without a row is served right."""


def row_of(feature: str, engine: str, version: Version) -> Row | None:
    """The row that decides; ``None`` when the engine has no trouble with the feature."""
    for row in ROWS:
        same = (row.feature, row.engine) == (feature, engine)
        if same and row.since <= version < row.until:
            return row
    return None
