"""Rows come with the place they stand at; a bad one says what to do."""

import json

import pytest

from toolkit.data.sources import RawRow, read_source, source_name
from toolkit.errors import DataError
from toolkit.recipe.data import DataSource


def rows(tmp_path, name, content, **source):
    if isinstance(content, str):
        content = content.encode()
    (tmp_path / name).write_bytes(content)
    return list(read_source(DataSource(path=name, **source), tmp_path))


def failure(tmp_path, **source):
    with pytest.raises(DataError) as error:
        list(read_source(DataSource(**source), tmp_path))
    return error.value


def test_jsonl_rows_carry_file_and_line(tmp_path):
    assert rows(tmp_path, "a.jsonl", '{"a": 1}\n\n{"a": 2}\n') == [
        RawRow("a.jsonl:1", {"a": 1}),
        RawRow("a.jsonl:3", {"a": 2}),
    ]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    assert rows(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + b'{"a": 1}')[0].values == {"a": 1}
    assert rows(tmp_path, "a.csv", b"\xef\xbb\xbf" + b"a\n1\n")[0].values == {"a": "1"}


def test_bad_jsonl_lines_are_yielded_with_their_problem(tmp_path):
    found = rows(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n')
    assert found[1].where == "a.jsonl:2"
    assert found[1].problem == (
        "not JSON: Expecting value at column 7; every line of a .jsonl file is one JSON object"
    )
    assert found[2].problem == "the row is a list, not an object"
    assert found[3].problem == "not UTF-8 at byte 7: save the file as UTF-8"


def test_json_is_one_list_of_rows(tmp_path):
    assert rows(tmp_path, "a.json", '[{"a": 1}]') == [RawRow("a.json row 1", {"a": 1})]


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (
            '{"a": 1}\n{"a": 2}',
            "a.json:2: not JSON: Extra data at column 1",
            "one row per line is .jsonl",
        ),
        ('{"a": 1}', "a.json: holds a dict, not a list of rows", "write it as [{...}, {...}]"),
        (b'["\xff"]', "a.json: not UTF-8 at byte 2", "save it as UTF-8"),
    ],
)
def test_a_json_file_that_is_no_list_is_refused(tmp_path, content, message, hint):
    with pytest.raises(DataError) as error:
        rows(tmp_path, "a.json", content)
    assert error.value.message == message
    assert hint in error.value.hint


def test_csv_rows_carry_the_line_they_end_on(tmp_path):
    found = rows(tmp_path, "a.csv", 'a,b\n1,"two\nlines"\n3,4\n')
    assert found == [
        RawRow("a.csv:3", {"a": "1", "b": "two\nlines"}),
        RawRow("a.csv:4", {"a": "3", "b": "4"}),
    ]


def test_csv_rows_with_other_than_the_header_fields_are_bad(tmp_path):
    found = rows(tmp_path, "a.csv", "a,b\n1\n1,2,3\n")
    assert found[0].problem == "has 1 fields, the header has 2"
    assert found[1].problem == "has 3 fields, the header has 2: quote fields with commas"


def test_columns_are_renamed(tmp_path):
    assert rows(tmp_path, "a.jsonl", '{"q": 1, "x": 2}', columns={"q": "prompt"})[0].values == {
        "prompt": 1,
        "x": 2,
    }


def test_renaming_a_column_that_no_row_has_is_refused(tmp_path):
    with pytest.raises(DataError) as error:
        rows(tmp_path, "a.jsonl", '{"q": 1}', columns={"Q": "prompt"})
    assert error.value.message == "a.jsonl: `columns` renames 'Q', which no row has"


def test_renaming_onto_an_existing_column_is_a_bad_row(tmp_path):
    found = rows(tmp_path, "a.jsonl", '{"q": 1, "prompt": 2}', columns={"q": "prompt"})
    assert found[0].problem == "`columns` gives one name to two columns of the row"


def test_a_missing_file_and_an_unknown_kind_are_refused(tmp_path):
    error = failure(tmp_path, path="no.jsonl")
    assert error.message == f"no.jsonl: no such file (looked for {tmp_path / 'no.jsonl'})"
    assert error.hint == "paths start at the folder of the recipe"
    error = failure(tmp_path, path="a.xlsx")
    assert error.message == "a.xlsx: .xlsx is not a kind of data file"
    assert error.hint == "use .jsonl, .json, .csv, .parquet"


def write(tmp_path, code):
    (tmp_path / "gen.py").write_text(code)


def test_a_python_function_yields_rows_and_gets_its_arguments(tmp_path):
    (tmp_path / "words.py").write_text("WORDS = ['a', 'b', 'c']\n")
    write(
        tmp_path,
        "from words import WORDS\ndef rows(n):\n"
        "    for w in WORDS[:n]:\n        yield {'text': w}\n",
    )
    found = list(read_source(DataSource(python="gen.py:rows", arguments={"n": 2}), tmp_path))
    assert found == [
        RawRow("gen.py:rows row 1", {"text": "a"}),
        RawRow("gen.py:rows row 2", {"text": "b"}),
    ]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def rows():\n    yield {}\n    raise KeyError('x')\n",
            "gen.py:rows failed: KeyError: 'x' (line 3)",
        ),
        (
            "import nothing\n",
            "gen.py:rows: gen.py cannot be imported: ModuleNotFoundError: No module named 'nothing' (line 1)",
        ),
        ("def other(): pass\n", "gen.py:rows: gen.py has no function 'rows'"),
        ("def rows(n): yield {}\n", "gen.py:rows failed: TypeError"),
    ],
)
def test_a_failing_python_source_names_its_line(tmp_path, code, message):
    write(tmp_path, code)
    assert failure(tmp_path, python="gen.py:rows").message.startswith(message)


def test_a_missing_python_file_is_named(tmp_path):
    assert failure(tmp_path, python="gen.py:rows").message.startswith(
        "gen.py:rows: there is no file "
    )


def test_sources_are_named_as_the_recipe_names_them():
    assert source_name(DataSource(path="a.csv")) == "a.csv"
    assert source_name(DataSource(hub="org/x", revision="0" * 40)) == "org/x:train"
    assert source_name(DataSource(python="a.py:f")) == "a.py:f"


def test_json_and_jsonl_give_the_same_values(tmp_path):
    value = [{"text": "ä"}, {"text": "b"}]
    lines = "\n".join(json.dumps(v) for v in value)
    one = [r.values for r in rows(tmp_path, "a.json", json.dumps(value))]
    assert one == [r.values for r in rows(tmp_path, "a.jsonl", lines)] == value
