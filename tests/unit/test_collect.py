"""Rows are counted and split; equal rows never stand on both sides."""

import json

import pytest

from toolkit.data.collect import collect
from toolkit.errors import DataError
from toolkit.recipe.data import DataSection


def write(tmp_path, name, texts):
    (tmp_path / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def section(**values):
    return DataSection.model_validate({"sources": [{"path": "a.jsonl"}], **values})


WORDS = [f"word {n}" for n in range(200)]


def adds_up(counts):
    return (
        counts.rows
        == counts.invalid + counts.held_out + counts.overlap + counts.left_out + counts.used
    )


def test_equal_rows_stand_on_one_side(tmp_path):
    write(tmp_path, "a.jsonl", WORDS + WORDS)
    found = collect(section(heldout={"fraction": 0.2}), tmp_path, seed=0)
    train, held = {r.id for r in found.train}, {r.id for r in found.heldout}
    assert not train & held
    assert len(train | held) == 200
    assert len(found.train) == 2 * len(train)  # duplicates stay in training
    assert len(found.heldout) == len(held)  # and are scored once
    assert found.sources[0].duplicates == 200
    assert adds_up(found.sources[0])


def test_equal_rows_of_two_sources_stand_on_one_side(tmp_path):
    write(tmp_path, "a.jsonl", WORDS)
    write(tmp_path, "b.jsonl", WORDS)
    data = section(sources=[{"path": "a.jsonl"}, {"path": "b.jsonl"}], heldout={"fraction": 0.2})
    found = collect(data, tmp_path, seed=0)
    assert not {r.id for r in found.train} & {r.id for r in found.heldout}


def test_the_split_is_repeatable_and_depends_on_the_seed(tmp_path):
    write(tmp_path, "a.jsonl", WORDS)
    data = section(heldout={"fraction": 0.2})
    first, again, other = (collect(data, tmp_path, seed=s) for s in (0, 0, 1))
    assert first.heldout == again.heldout
    assert {r.id for r in first.heldout} != {r.id for r in other.heldout}


def test_rows_of_a_heldout_source_are_removed_from_training_and_counted(tmp_path):
    write(tmp_path, "a.jsonl", WORDS)
    write(tmp_path, "test.jsonl", [*WORDS[:5], "new", "new"])
    found = collect(section(heldout={"sources": [{"path": "test.jsonl"}]}), tmp_path, seed=0)
    train, held = found.sources
    assert (train.overlap, train.used, train.held_out) == (5, 195, 0)
    assert (held.role, held.rows, held.duplicates) == ("heldout", 7, 1)
    assert [r.body["text"] for r in found.heldout] == [*WORDS[:5], "new"]
    assert not {r.id for r in found.train} & {r.id for r in found.heldout}
    assert all(map(adds_up, found.sources))


def test_heldout_rows_above_the_limit_are_trained_when_they_come_from_the_sources(tmp_path):
    write(tmp_path, "a.jsonl", WORDS)
    found = collect(section(heldout={"fraction": 0.5, "max_rows": 10}), tmp_path, seed=0)
    assert (len(found.heldout), len(found.train)) == (10, 190)


def test_heldout_rows_above_the_limit_stay_out_of_training_when_they_have_a_source(tmp_path):
    write(tmp_path, "a.jsonl", WORDS)
    write(tmp_path, "test.jsonl", WORDS[:50])
    held = {"sources": [{"path": "test.jsonl"}], "max_rows": 10}
    found = collect(section(heldout=held), tmp_path, seed=0)
    assert (len(found.heldout), len(found.train)) == (10, 150)


def test_weights_repeat_and_leave_out_training_rows_alone(tmp_path):
    write(tmp_path, "a.jsonl", WORDS)
    held = {"fraction": 0.1}
    plain = collect(section(heldout=held), tmp_path, seed=0)
    double = collect(
        section(sources=[{"path": "a.jsonl", "weight": 2}], heldout=held), tmp_path, seed=0
    )
    half = collect(
        section(sources=[{"path": "a.jsonl", "weight": 0.5}], heldout=held), tmp_path, seed=0
    )
    assert plain.heldout == double.heldout == half.heldout
    assert {r.copies for r in double.train} == {2}
    assert 60 < len(half.train) < 120
    assert half.sources[0].left_out == len(plain.train) - len(half.train)
    assert all(adds_up(f.sources[0]) for f in (plain, double, half))


def test_invalid_rows_stop_the_run_with_their_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n{"text": ""}\n{"text": "b"}\n')
    with pytest.raises(DataError) as error:
        collect(section(), tmp_path, seed=0)
    assert error.value.message == (
        "2 rows of 4 cannot be read:\n"
        "  a.jsonl:2: not JSON: Expecting value at column 10; every line of a .jsonl file is one JSON object\n"
        "  a.jsonl:3: the text is empty"
    )
    assert error.value.hint == (
        "mend the rows, or set data.on_invalid: drop (data.max_dropped bounds how many)"
    )


def test_invalid_rows_are_counted_when_they_are_dropped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": \n{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    found = collect(section(on_invalid="drop", heldout={"fraction": 0}), tmp_path, seed=0)
    assert [r.where for r in found.train] == ["a.jsonl:2", "a.jsonl:4"]
    assert found.sources[0].invalid == 2


def test_only_the_first_invalid_rows_are_shown(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + '{"text": ""}\n' * 50)
    with pytest.raises(DataError) as error:
        collect(section(), tmp_path, seed=0)
    assert len(error.value.message.splitlines()) == 6


def test_an_empty_source_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"a.jsonl has no rows"):
        collect(section(), tmp_path, seed=0)


def test_training_on_nothing_is_refused(tmp_path):
    write(tmp_path, "a.jsonl", WORDS[:3])
    write(tmp_path, "test.jsonl", WORDS)
    with pytest.raises(DataError) as error:
        collect(section(heldout={"sources": [{"path": "test.jsonl"}]}), tmp_path, seed=0)
    assert error.value.message.startswith(
        "no row is left to train on: a.jsonl: 3 rows, 0 invalid, 0 held out, "
        "3 also held out elsewhere"
    )


def test_unrecognised_columns_stop_the_run_even_when_invalid_rows_are_dropped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": 1}\n')
    with pytest.raises(DataError, match="no row format has these columns: 'q'"):
        collect(section(on_invalid="drop"), tmp_path, seed=0)


def test_ignored_columns_are_remembered(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": 1}\n{"text": "b", "score": 1}\n')
    assert collect(section(), tmp_path, seed=0).sources[0].ignored_columns == ("score",)


def test_progress_is_reported_while_reading(tmp_path):
    write(tmp_path, "a.jsonl", WORDS * 11)
    seen = []
    collect(section(), tmp_path, 0, lambda n, name: seen.append((n, name)))
    assert seen == [(1000, "a.jsonl"), (2000, "a.jsonl")]
