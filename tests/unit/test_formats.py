"""Every row format becomes the same body; every mistake is named."""

import json

import pytest

from toolkit.data.formats import FORMATS, RowError, ignored_columns, read_row, recognise
from toolkit.errors import DataError

Q = {"role": "user", "content": "Where is it?"}
A = {"role": "assistant", "content": "Here."}
S = {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [Q, A]}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"text": "a"}, "text"),
        ({"text": "a", "messages": [Q, A]}, "messages"),
    ],
)
def test_a_format_is_recognised_by_its_columns(row, name):
    assert recognise(row, "a.jsonl:1") == name


def test_unknown_columns_are_listed_with_the_known_formats():
    with pytest.raises(DataError) as error:
        recognise({"q": 1, "a": 2}, "a.jsonl:1")
    assert error.value.message == "a.jsonl:1: no row format has these columns: 'q', 'a'"
    for name, row_format in FORMATS.items():
        assert f"{name} ({', '.join(row_format.columns)})" in error.value.hint
    assert "columns: {theirs: ours}" in error.value.hint


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [Q, A]}),
        ("messages", {"messages": json.dumps([Q, A])}),
        ("messages", {"messages": [{**Q, "content": [{"type": "text", "text": Q["content"]}]}, A]}),
        ("messages", {"messages": [{**Q, "tool_calls": None}, {**A, "name": None}], "tools": None}),
        ("messages", {"messages": [Q, A, {"role": "user", "content": "thanks"}]}),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": Q["content"]},
                    {"from": "gpt", "value": A["content"]},
                ]
            },
        ),
        ("sharegpt", {"conversations": [Q, A]}),
        ("prompt_completion", {"prompt": Q["content"], "completion": A["content"]}),
        ("prompt_completion", {"prompt": [Q], "completion": [A]}),
        ("alpaca", {"instruction": Q["content"], "input": "", "output": A["content"]}),
        ("alpaca", {"instruction": Q["content"], "output": A["content"]}),
    ],
)
def test_every_conversation_format_gives_the_same_messages(name, row):
    assert read_row(row, name) == {"messages": [Q, A]}


def test_alpaca_joins_instruction_and_input_and_reads_system_and_history():
    row = {
        "instruction": "Translate",
        "input": "Haus",
        "output": "house",
        "system": "Be short.",
        "history": [["Hi", "Hello"]],
    }
    assert read_row(row, "alpaca")["messages"] == [
        S,
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Translate\n\nHaus"},
        {"role": "assistant", "content": "house"},
    ]


def test_sharegpt_system_and_function_call_are_read():
    call = json.dumps({"name": "find", "arguments": {"what": "cat"}})
    row = {
        "system": "Be short.",
        "tools": '[{"name": "find"}]',
        "conversations": [
            {"from": "human", "value": "cat?"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "under the bed"},
            {"from": "gpt", "value": "Under the bed."},
        ],
    }
    body = read_row(row, "sharegpt")
    assert [m["role"] for m in body["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert body["tools"] == [{"name": "find"}]
    assert body["messages"][2]["tool_calls"] == [
        {"type": "function", "function": {"name": "find", "arguments": {"what": "cat"}}}
    ]


def test_tool_arguments_in_a_string_become_an_object_as_a_server_makes_them():
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"n": 1}'}}
    body = read_row(
        {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [call]}]}, "messages"
    )
    assert body["messages"][1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"n": 1}}}
        ],
    }


def test_text_stays_text():
    assert read_row({"text": " a \n"}, "text") == {"text": " a \n"}


def test_fields_that_templates_may_read_are_kept():
    answer = {**A, "reasoning_content": "look"}
    assert read_row({"messages": [Q, answer]}, "messages")["messages"][1] == answer


def test_columns_that_no_format_reads_are_named():
    assert ignored_columns({"messages": [], "tools": [], "score": 1}, "messages") == ("score",)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "alpaca",
            {"instruction": "a", "ouput": "b"},
            "column 'output' is missing (did you mean 'ouput'?); alpaca needs instruction, output",
        ),
        ("messages", {"messages": "no json"}, "messages is text that is not JSON"),
        ("messages", {"messages": {"a": 1}}, "messages is an object, not a list"),
        (
            "messages",
            {"messages": ["hi", A]},
            "message 1 is text, not an object with role and content",
        ),
        (
            "messages",
            {"messages": [{"rol": "user"}, A]},
            "message 1 has no 'role' (did you mean 'rol'?); its keys",
        ),
        (
            "messages",
            {"messages": [{**Q, "role": "usr"}, A]},
            "message 1 has the role 'usr' (did you mean 'user'?)",
        ),
        (
            "messages",
            {"messages": [{**Q, "content": 3}, A]},
            "message 1: content is a number, not text",
        ),
        (
            "messages",
            {"messages": [{**Q, "content": [{"type": "image_url"}]}, A]},
            "message 1: a content part is 'image_url'; only 'text' parts can be trained",
        ),
        (
            "messages",
            {"messages": [Q]},
            "no message is from the assistant: there is nothing to learn",
        ),
        ("messages", {"messages": [A]}, "the assistant speaks first: there is no question"),
        ("messages", {"messages": [Q, {**A, "content": " "}]}, "message 2 is an empty answer"),
        (
            "messages",
            {"messages": [Q, {**A, "weight": 0.5}]},
            "message 2 has weight 0.5; 1 trains the answer, 0 does not",
        ),
        (
            "messages",
            {"messages": [Q, {**A, "tool_calls": [{"x": 1}]}]},
            "message 2: a tool call has no function name",
        ),
        (
            "messages",
            {"messages": [Q, {**A, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            "message 2: arguments of 'f' are a list, not an object",
        ),
        ("messages", {"messages": [Q, A], "tools": '{"a": 1}'}, "tools is an object, not a list"),
        (
            "messages",
            {"messages": [Q, {**A, "content": "\ud800"}]},
            "the text holds half of a surrogate pair",
        ),
        (
            "messages",
            {"messages": [Q, {**A, "extra": {1}}]},
            "the row holds a value that JSON cannot",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "text": "a"}]},
            "message 1 has no 'value'; its keys are",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "alien", "value": "a"}]},
            "message 1 is from 'alien'",
        ),
        ("alpaca", {"instruction": 3, "output": "b"}, "instruction is a number, not text"),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": ["a"]},
            "history 1 is text, not a question",
        ),
        ("text", {"text": "  "}, "the text is empty"),
    ],
)
def test_a_bad_row_says_what_is_wrong(name, row, message):
    with pytest.raises(RowError) as error:
        read_row(row, name)
    assert error.value.message.startswith(message)
