"""Reward functions are called with what they ask for, and what they return is checked."""

import math

import pytest

from toolkit.errors import StepFailedError
from toolkit.train.rewards import Question, load_rewards, read_questions, try_out

QUESTIONS = [
    Question([{"role": "user", "content": "a"}], "A", {"colour": "red"}),
    Question([{"role": "user", "content": "b"}], None, {"size": 2}),
]


@pytest.fixture
def reward(tmp_path):
    def write(code):
        (tmp_path / "r.py").write_text(f"import math\n{code}\n")
        (found,) = load_rewards(["r.py:f"], tmp_path)
        return found

    return write


def test_it_gets_the_arguments_that_it_takes(reward):
    f = reward(
        "def f(completions, prompts, references, colour, size):\n"
        "    assert prompts[0][0]['content'] == 'a'\n"
        "    assert (references, colour, size) == (['A', None], ['red', None], [None, 2])\n"
        "    return [len(c) for c in completions]"
    )
    assert f(QUESTIONS, ["xx", ""]) == [2.0, 0.0]
    assert reward("def f(completions): return map(len, completions)")(QUESTIONS, ["", "x"]) == [
        0,
        1,
    ]
    everything = reward("def f(**given): return [len(given), 0]")
    assert everything(QUESTIONS, ["", ""])[0] == 5


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def f(completions): return [1]", "returned 1 numbers for 2 answers"),
        ("def f(completions): return [1, math.nan]", "returned nan for answer 1: 'second'"),
        ("def f(completions): return [None, 1]", "returned None for answer 0: 'first'"),
        ("def f(completions): return ['good', 1]", "returned 'good' for answer 0"),
        ("def f(completions): return 1", "raised TypeError"),
        ("def f(completions):\n    raise ValueError('no')", r"raised ValueError: no \(line 3\)"),
        ("def f(completions): raise SystemExit(3)", r"raised SystemExit: 3 \(line"),
        ("def f(completions, taste): return [0, 0]", "raised TypeError.*taste"),
    ],
)
def test_what_is_no_number_for_every_answer_is_said(reward, code, says):
    with pytest.raises(StepFailedError, match=says) as raised:
        reward(code)(QUESTIONS, ["first", "second"])
    assert raised.value.message.startswith("reward r.py:f ")
    assert raised.value.hint


def test_a_function_that_is_not_there_is_said(tmp_path):
    with pytest.raises(StepFailedError, match=r"reward r\.py:f: there is no file"):
        load_rewards(["r.py:f"], tmp_path)


def test_it_is_tried_before_a_model_is_loaded(reward):
    f = reward("def f(completions): return [1 / len(c) for c in completions]")
    with pytest.raises(StepFailedError, match="raised ZeroDivisionError"):
        try_out([f], QUESTIONS)
    try_out([reward("def f(completions): return [0.5] * len(completions)")], QUESTIONS)


def test_questions_are_rows_without_their_answers(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(
        '{"id": "1", "messages": [{"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "A"}], "columns": {"k": 1}}\n'
        '{"id": "2", "messages": [{"role": "user", "content": "b"}]}\n'
    )
    one, two = read_questions(file)
    assert (one.messages, one.reference, one.columns) == (
        [{"role": "user", "content": "a"}],
        "A",
        {"k": 1},
    )
    assert (two.messages[0]["content"], two.reference) == ("b", None)
    assert math.isfinite(len(two.columns))
