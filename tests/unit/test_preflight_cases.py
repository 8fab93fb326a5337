"""Every fixture of ``preflight_cases/`` gets the verdict that it names, with a fix that says what to do."""

import subprocess
import sys
import time

import pytest

from tests.preflight_cases import adapter_cases, recipe_cases
from toolkit.preflight import RULES, Outcome
from toolkit.preflight.adapter_facts import read_adapter
from toolkit.preflight.features import FEATURES, ROWS
from toolkit.preflight.formats import SUPPORT
from toolkit.preflight.layouts import LIMITS, layout_of

CASES = (*recipe_cases(), *adapter_cases())

VERBS = (
    *("add", "ask", "choose", "convert", "copy", "correct", "define", "export", "give", "keep", "leave"),
    *("look", "lower", "make sure", "merge", "point", "put", "quantize", "read", "remove", "rank", "save"),
    *("serve", "set", "sizes", "stop", "take", "train", "try", "use", "values", "write", "raise"),
    *("paths", "it follows", "the base calls", "the file defines", "it takes", "groups of"),
)  # fmt: skip
"""How a fix begins: with something to do, or with the values that work."""


def named(case):
    return f"{case.rule}: {case.name}" + (f" ({case.engine})" if case.engine else "")


@pytest.mark.parametrize("case", CASES, ids=named)
def test_the_verdict_is_the_expected_one(case, tmp_path):
    verdicts = case.judge(tmp_path)
    spoken = [v for v in verdicts if v.outcome is not Outcome.ok and v.rule not in case.allows]
    if case.expect == "ok":
        assert spoken == []
        assert {case.rule, *case.also} <= {v.rule for v in verdicts}
        return
    assert {v.rule for v in spoken} == {case.rule}, [str(v) for v in spoken]
    assert {str(v.outcome) for v in spoken} == {case.expect}
    assert any(case.says in v.message and case.fix in (v.hint or "") for v in spoken), spoken
    assert all((v.hint or "").startswith(VERBS) for v in spoken), spoken
    assert all(v.source for v in spoken)


def test_there_are_enough_cases():
    assert len(CASES) >= 200
    assert len({case.name for case in CASES}) >= 120


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_every_rule_is_seen_speaking_and_silent(rule):
    seen = {c.expect == "ok" for c in CASES if rule.id in (c.rule, *c.also)}
    assert seen == {True, False}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(feature, engine) of every adapter's fixture that an engine is given, and with "" of all."""
    found = set()
    for entry in {case.name: case for case in adapter_cases()}.values():
        folder = tmp_path_factory.mktemp("adapter")
        entry.write(folder)
        adapter = read_adapter(folder / "a")
        features = [f.id for f in FEATURES.values() if f.found(adapter)]
        found |= {(feature, engine) for feature in features for engine in ("", *entry.real)}
    return found


def test_every_feature_of_the_table_is_seen(shown):
    assert {f for f in FEATURES if (f, "") not in shown} == {"monteclora", "arrow"}


def test_every_row_and_limit_says_where_it_was_learned():
    assert all(row.source and row.fix for row in ROWS)
    assert all(limit.source and limit.fix for limit in LIMITS)


def test_every_rule_has_a_fix_and_a_source():
    ids = [rule.id for rule in RULES]
    assert len(set(ids)) == len(ids)
    assert all(rule.fix and rule.source and rule.must for rule in RULES)


def test_every_row_that_is_said_to_be_compared_has_a_fixture_that_an_engine_is_given(shown):
    said = {(row.feature, one.rpartition(" ")[0]) for row in ROWS for one in row.tried}
    assert said - shown == set()
    formats = {
        (layout_of(case.base["quantization_config"]).format, engine)
        for case in recipe_cases()
        for engine in case.real
        if "quantization_config" in case.base
    }
    said = {(row.format, one.rpartition(" ")[0]) for row in SUPPORT for one in row.tried}
    assert said - formats == set()


def test_a_real_engine_never_surprises_preflight():
    """What is let through is served right by the engine; what does harm is refused."""
    for case in adapter_cases():
        real = case.real.get(case.engine)
        if case.expect == "ok" and real and case.name != EXCEPT:
            assert real == "changes", named(case)
        if real in ("ignores", "dies"):
            assert case.expect == "refuse", named(case)


EXCEPT = "rank 128 where the engine was given 64"


def test_the_whole_of_preflight_takes_less_than_a_second_and_no_torch(tmp_path):
    case = next(c for c in adapter_cases() if c.name == "all linear layers")
    start = time.process_time()
    case.judge(tmp_path)
    assert time.process_time() - start < 1
    code = (
        "import sys, toolkit.preflight; "
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'mlflow', 'numpy', 'safetensors'}))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
