"""Metrics of one answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import DataError, UsageError
from toolkit.evaluation.metrics import load_metric

ROW = {"id": "r1"}
HERE = Path()


def score(name: str, prediction: str, reference: str) -> float:
    return load_metric(name, HERE)(prediction, reference, ROW)


@pytest.mark.parametrize(
    ("prediction", "reference", "wanted"),
    [(" yes\n", "yes", 1), ("Yes", "yes", 0), ("", "", 1), ("yes, sir", "yes", 0)],
)
def test_exact_match_ignores_only_white_space_at_the_ends(prediction, reference, wanted):
    assert score("exact_match", prediction, reference) == wanted


@pytest.mark.parametrize(
    ("prediction", "wanted"),
    [
        ('{"b": [1, 2], "a": "x"}', 1),
        ('\n{"a":"x","b":[1,2]} ', 1),
        ('{"a": "x", "b": [2, 1]}', 0),
        ('{"a": "x"}', 0),
        ('{"a": "x", "b": [1, 2], "c": 1}', 0),
        ('{"a": "x", "b": [true, 2]}', 0),
        ('{"a": "x", "b": [1.0, 2]}', 1),
        ('Sure: {"a": "x", "b": [1, 2]}', 0),
        ("", 0),
    ],
)
def test_json_match_compares_values_not_text(prediction, wanted):
    assert score("json_match", prediction, '{"a": "x", "b": [1, 2]}') == wanted


def test_json_match_refuses_a_reference_that_is_not_json():
    with pytest.raises(DataError, match="json_match needs references in JSON, but one is 'hello'"):
        score("json_match", "{}", "hello")


def test_contains_looks_anywhere_in_the_answer():
    assert score("contains", "It is Paris, of course.", "Paris ") == 1
    assert score("contains", "It is Rome.", "Paris") == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "wanted"),
    [
        ("the red car", "the red car", 1),
        ("a b", "b c", 0.5),
        ("x", "y", 0),
        ("", "", 1),
        ("", "y", 0),
        ("B a", "A b", 1),
    ],
)
def test_token_f1_counts_shared_words(prediction, reference, wanted):
    assert score("token_f1", prediction, reference) == pytest.approx(wanted)


def test_token_f1_counts_a_repeated_word_as_often_as_both_have_it():
    assert score("token_f1", "a a a a", "a") == pytest.approx(2 * 1 / 5)


def test_unknown_metric_names_the_likely_one():
    with pytest.raises(
        UsageError, match=r"no metric is named 'exactmatch' \(did you mean 'exact_match'\?\)"
    ):
        load_metric("exactmatch", HERE)


def test_user_function_gets_prediction_reference_and_row(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "def f(prediction, reference, row):\n    return len(prediction) + row['bonus']\n"
    )
    metric = load_metric("mine.py:f", tmp_path)
    assert metric("abc", "", {"id": "1", "bonus": 2}) == 5.0


def test_missing_file_of_a_user_metric_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"metric no\.py:f: there is no file .*no\.py") as error:
        load_metric("no.py:f", tmp_path)
    assert error.value.hint == "the path is relative to the recipe"


def test_missing_function_of_a_user_metric_names_the_likely_one(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def score(prediction, reference, row):\n    return 1\n")
    with pytest.raises(
        UsageError, match=r"has no function 'scor' \(did you mean 'score'\?\)"
    ) as error:
        load_metric("mine.py:scor", tmp_path)
    assert "def function(prediction: str, reference: str, row: dict) -> float" in (
        error.value.hint or ""
    )


def test_a_user_file_that_cannot_be_imported_says_why(tmp_path: Path):
    (tmp_path / "mine.py").write_text("import no_such_module_here\n")
    with pytest.raises(
        UsageError,
        match="cannot be imported: ModuleNotFoundError: No module named 'no_such_module_here'",
    ):
        load_metric("mine.py:f", tmp_path)


def test_a_user_metric_may_use_dataclasses_and_its_neighbours(tmp_path: Path):
    (tmp_path / "scores_beside.py").write_text("FULL = 1.0\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from scores_beside import FULL\n\n@dataclass\nclass Score:\n    value: float\n\n"
        "def f(prediction, reference, row):\n    return Score(FULL).value\n"
    )
    assert load_metric("mine.py:f", tmp_path)("", "", ROW) == 1.0


def test_a_user_metric_that_raises_names_the_row(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def f(prediction, reference, row):\n    return 1 / 0\n")
    with pytest.raises(
        DataError, match=r"metric mine\.py:f on row r1 raised ZeroDivisionError: division by zero"
    ):
        load_metric("mine.py:f", tmp_path)("", "", ROW)


@pytest.mark.parametrize("value", ["'good'", "None", "float('nan')"])
def test_a_user_metric_must_return_a_number(tmp_path: Path, value: str):
    (tmp_path / "mine.py").write_text(f"def f(prediction, reference, row):\n    return {value}\n")
    with pytest.raises(DataError, match=r"metric mine\.py:f on row r1 returned") as error:
        load_metric("mine.py:f", tmp_path)("", "", ROW)
    assert error.value.hint == "return a number; higher is better"
