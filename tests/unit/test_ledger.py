"""The ledger accounts for every row, and its budgets stop a run."""

import json

import pytest

from toolkit.data.ledger import Ledger, SourceCounts, SplitCounts, counted
from toolkit.errors import DataError


def ledger(**train):
    source = SourceCounts(
        "a.jsonl",
        "train",
        "messages",
        rows=102,
        invalid=2,
        used=100,
        examples=["a.jsonl:7: not JSON"],
    )
    return Ledger([source], train=SplitCounts(rows=100, sequences=100, **train))


def test_dropped_rows_above_the_budget_stop_the_run_with_counts_and_examples():
    book = ledger(
        too_long=4,
        without_trained=1,
        examples={"too long": ["a.jsonl:9: 812 tokens, model.max_length is 512"]},
    )
    with pytest.raises(DataError) as error:
        book.check_budgets(0.05, 0.05)
    assert error.value.message == (
        "7 rows of 102 (6.86%) were dropped (2 unreadable, 4 too long, 1 without a trained token), "
        "but data.max_dropped allows 5.00%\n"
        "  a.jsonl:7: not JSON\n"
        "  a.jsonl:9: 812 tokens, model.max_length is 512"
    )
    assert (
        error.value.hint
        == "mend the rows, raise model.max_length, or raise data.max_dropped to 0.0687"
    )


def test_no_budget_above_all_rows_is_proposed():
    with pytest.raises(DataError) as error:
        ledger(too_long=100).check_budgets(0.05, 0.0)  # two are unreadable
    assert error.value.hint == "mend the rows, or raise model.max_length: none is left"


def test_truncated_rows_above_the_budget_stop_the_run():
    book = ledger(truncated=1, examples={"truncated": ["a.jsonl:3: 600 tokens"]})
    with pytest.raises(DataError) as error:
        book.check_budgets(1.0, 0.0)
    assert error.value.message == (
        "1 row of 102 (0.98%) was truncated, but data.max_truncated allows 0.00%\n"
        "  a.jsonl:3: 600 tokens"
    )


def test_a_share_equal_to_the_budget_is_within_it():
    ledger().check_budgets(2 / 102, 0.0)


def test_an_empty_ledger_breaks_no_budget():
    Ledger([]).check_budgets(0.0, 0.0)


def test_the_stop_share_counts_turns_and_is_one_without_turns():
    assert SplitCounts(turns=4, stops=3).stop_share == 0.75
    assert SplitCounts().stop_share == 1.0


def test_percentiles_are_lengths_that_occur():
    counts = SplitCounts()
    counts.measure(list(range(1, 101)))
    assert counts.lengths == {"p50": 51, "p90": 90, "p99": 99, "max": 100}
    counts = SplitCounts()
    counts.measure([])
    assert counts.lengths == {}


def test_only_the_first_examples_of_a_kind_are_kept():
    counts = SplitCounts()
    for n in range(9):
        counts.example("too long", str(n))
    assert counts.examples == {"too long": ["0", "1", "2", "3", "4"]}


def test_the_files_hold_the_same_numbers(tmp_path):
    book = ledger(written=95, tokens=1000, trained_tokens=300, turns=95, stops=95, too_long=3)
    book.train.measure([10, 20])
    book.stop_token, book.packed_sequences, book.packing_efficiency = "<|im_end|>", 2, 0.97
    book.notes.append("one thing to know")
    book.write(tmp_path)
    value = json.loads((tmp_path / "ledger.json").read_text())
    assert value["dropped"] == {"unreadable": 2, "too long": 3, "without a trained token": 0}
    assert value["train"]["stop_share"] == 1.0
    text = (tmp_path / "ledger.md").read_text()
    assert "| a.jsonl | messages | 102 | 2 | 0 | 0 | 0 | 0 | 100 |" in text
    assert "| trained tokens | 300 | 0 |" in text
    assert "| stop token trained | 100.0% | 100.0% |" in text
    assert "- one thing to know" in text
    assert all(isinstance(v, int | float) for v in book.metrics.values())


def test_one_is_singular():
    assert (counted(1, "row"), counted(0, "row")) == ("1 row", "0 rows")
