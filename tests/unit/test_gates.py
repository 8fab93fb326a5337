"""Gates."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from toolkit import gates
from toolkit.errors import GateFailedError
from toolkit.recipe.evaluate import GateSection

REPORTS = {
    "base": {"exact_match": 0.02, "perplexity": 9.0},
    "tuned": {"exact_match": 0.9, "perplexity": 2.0},
    "gptq": {"exact_match": 0.87, "perplexity": 2.2},
}
ROWS = {"base": 120, "tuned": 120, "gptq": 100}


def verdict(**keys) -> gates.Verdict:
    (only,) = gates.check([GateSection(**keys)], REPORTS, ROWS)
    return only


def test_min_passes_at_the_bound_itself():
    assert verdict(of="tuned", metric="exact_match", min=0.9).passed


def test_min_fails_below_the_bound_and_names_metric_value_bound_and_rows():
    found = verdict(of="tuned", metric="exact_match", min=0.95)
    assert not found.passed
    assert found.message == "tuned: exact_match is 0.9, below min 0.95 (120 rows)"


def test_max_fails_above_the_bound():
    found = verdict(of="base", metric="perplexity", max=5)
    assert not found.passed
    assert found.message == "base: perplexity is 9, above max 5 (120 rows)"


def test_max_drop_holds_where_floating_point_would_not():
    assert 0.9 - 0.87 > 0.03
    assert verdict(of="gptq", metric="exact_match", max_drop=0.03).passed


def test_max_drop_fails_and_names_both_models_with_their_rows():
    found = verdict(of="gptq", metric="exact_match", max_drop=0.01)
    assert not found.passed
    assert found.gate == "gptq: exact_match max_drop 0.01 against tuned"
    assert found.message == (
        "gptq: exact_match is 0.87 (100 rows), tuned has 0.9 (120 rows): 0.03 worse, more than max_drop 0.01"
    )


@pytest.mark.parametrize(("bound", "passed"), [(0.1, False), (0.3, True)])
def test_higher_perplexity_is_worse(bound: float, passed: bool):
    assert verdict(of="gptq", metric="perplexity", max_drop=bound).passed is passed


def test_a_better_model_never_drops():
    found = verdict(of="tuned", metric="exact_match", max_drop=0, against="base")
    assert found.passed
    assert "no worse, within max_drop 0" in found.message


def test_a_metric_that_was_not_measured_fails_its_gate():
    found = verdict(of="tuned", metric="token_f1", min=0.1)
    assert not found.passed
    assert found.message == "tuned: token_f1 was not measured (measured: exact_match, perplexity)"


def test_a_drop_against_a_model_without_report_fails():
    (found,) = gates.check(
        [GateSection(of="gptq", metric="exact_match", max_drop=1)], {"gptq": REPORTS["gptq"]}, {}
    )
    assert found.message == "tuned: exact_match was not measured (measured: nothing)"


def test_every_bound_of_a_gate_is_checked():
    gate = GateSection(of="gptq", metric="exact_match", min=0.8, max=1, max_drop=0.05)
    assert [v.passed for v in gates.check([gate], REPORTS, ROWS)] == [True, True, True]


def test_require_lists_every_failure_and_exits_with_1():
    verdicts = gates.check(
        [
            GateSection(of="base", metric="exact_match", min=0.5),
            GateSection(of="tuned", metric="exact_match", min=0.5),
        ],
        REPORTS,
        ROWS,
    )
    with pytest.raises(GateFailedError) as failure:
        gates.require(verdicts)
    assert failure.value.message == (
        "1 of 2 gates failed:\n  base: exact_match is 0.02, below min 0.5 (120 rows)"
    )
    assert failure.value.exit_code == 1
    assert "rows.jsonl" in (failure.value.hint or "")


def test_require_lets_a_passing_run_go_on():
    gates.require(
        gates.check([GateSection(of="tuned", metric="exact_match", min=0.5)], REPORTS, ROWS)
    )


def test_junit_counts_failures_and_escapes_text(tmp_path):
    verdicts = [gates.Verdict("a<b", False, 'is 1 & "2"'), gates.Verdict("c", True, "fine")]
    gates.write(tmp_path, verdicts, "demo")
    suite = ET.parse(tmp_path / "gates.junit.xml").getroot()
    assert (suite.tag, suite.get("tests"), suite.get("failures")) == ("testsuite", "2", "1")
    failed, passed = suite.findall("testcase")
    assert failed.get("name") == "a<b"
    assert failed.find("failure").get("message") == 'is 1 & "2"'
    assert passed.find("failure") is None


def test_markdown_keeps_bars_inside_cells(tmp_path):
    gates.write(tmp_path, [gates.Verdict("a|b", False, "bad")], "demo")
    assert (tmp_path / "gates.md").read_text() == (
        "| gate | result | measured |\n|---|---|---|\n| a\\|b | **failed** | bad |\n"
    )
