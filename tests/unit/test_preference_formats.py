"""Rows of preference training, as people write them."""

import pytest

from toolkit.data.formats import RowError, ignored_columns, read_row, recognise
from toolkit.data.preference import formats_of
from toolkit.recipe.objectives import SCORED, TRAINED_ON

ASK = {"role": "user", "content": "Where is it?"}
GOOD = {"role": "assistant", "content": "On its way."}
BAD = {"role": "assistant", "content": "No idea."}
PAIR = {"messages": [ASK, GOOD], "rejected": BAD}


def read(objective, row, heldout=False):
    formats = formats_of(objective, heldout=heldout)
    return read_row(row, recognise(row, "a.jsonl:1", formats), formats)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Where is it?", "chosen": "On its way.", "rejected": "No idea."},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "Where is it?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    ],
    ids=["texts", "messages", "question in both", "UltraFeedback"],
)
def test_pairs_are_read_however_they_are_written(row):
    assert read("dpo", row) == PAIR
    assert read("orpo", row) == PAIR


def test_a_system_prompt_and_earlier_turns_belong_to_the_question():
    turns = [ASK, GOOD, {"role": "user", "content": "And now?"}]
    row = {"system": "Be kind.", "chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
    body = read("dpo", row)
    assert [m["role"] for m in body["messages"]] == [
        *("system", "user", "assistant", "user", "assistant")
    ]
    assert body["rejected"] == BAD


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same answer"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected is an empty answer"),
        ({"chosen": "b", "rejected": "c"}, "there is no question"),
        ({"prompt": "x", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "prompt is not how"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "prompt is empty"),
        (
            {"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, BAD, ASK, BAD]},
            "chosen is not one answer after the shared question, but assistant, user, assistant",
        ),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen is a number, not a list"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(row, says):
    with pytest.raises(RowError, match=says):
        read("dpo", row)


@pytest.mark.parametrize("label", [True, 1, "true", "Good", "desirable"])
def test_a_good_answer_is_marked_in_many_ways(label):
    row = {"prompt": "Where is it?", "completion": "On its way.", "label": label}
    assert read("kto", row) == {"messages": [ASK, GOOD], "label": True}
    assert read("kto", {"messages": [ASK, GOOD], "label": label})["label"] is True


def test_a_label_that_is_neither_is_refused():
    with pytest.raises(RowError, match=r"label is 'maybe'") as raised:
        read("kto", {"prompt": "a", "completion": "b", "label": "maybe"})
    assert raised.value.hint == "write true for a good answer and false for a bad one"
    with pytest.raises(RowError, match="there is no answer to the label"):
        read("kto", {"prompt": "a", "label": 1})


def test_a_prompt_keeps_its_columns_for_rewards():
    row = {"prompt": "Where is it?", "colour": "red", "parts": [1, 2]}
    assert read("grpo", row) == {"messages": [ASK], "columns": {"colour": "red", "parts": [1, 2]}}
    assert ignored_columns(row, "prompt", formats_of("grpo", heldout=False)) == ()


def test_rows_with_an_answer_are_prompts_too_and_the_answer_is_the_reference():
    row = {"messages": [ASK, GOOD], "colour": "red"}
    assert read("grpo", row) == {"messages": [ASK, GOOD], "columns": {"colour": "red"}}


def test_a_prompt_ends_with_a_question():
    with pytest.raises(RowError, match="does not end with a question"):
        read("grpo", {"prompt": [ASK, GOOD]})


def test_a_label_column_means_nothing_to_supervised_training():
    row = {"prompt": "a", "completion": "b", "label": 0}
    formats = formats_of("sft", heldout=False)
    assert recognise(row, "a.jsonl:1", formats) == "prompt_completion"


def test_held_out_rows_may_be_plain_conversations():
    assert read("dpo", {"messages": [ASK, GOOD]}, heldout=True) == {"messages": [ASK, GOOD]}
    for objective, formats in TRAINED_ON.items():
        assert set(formats) <= set(SCORED[objective])
        assert tuple(formats_of(objective, heldout=True)) == SCORED[objective]
