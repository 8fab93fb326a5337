"""Answers are found in what the template renders; a template that cannot be trained on is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.data.render import (
    Span,
    TemplateError,
    mask,
    prompt_messages,
    reference,
    views,
    with_system,
)
from toolkit.errors import DataError


def chatml(messages, ask):
    text = "".join(f"<{m['role']}>{m['content']}<end>\n" for m in messages)
    return text + "<assistant>" * ask


def thinking(messages, ask):
    """Drops the reasoning of all answers but the last, as Qwen3 does."""
    text = ""
    for n, m in enumerate(messages):
        think = (
            f"<think>{m.get('why', '')}</think>"
            if m["role"] == "assistant" and n == len(messages) - 1
            else ""
        )
        text += f"<{m['role']}>{think}{m['content']}<end>\n"
    return text + "<assistant>" * ask


def m(role, content, **more):
    return {"role": role, "content": content, **more}


TWO = [m("user", "a"), m("assistant", "b"), m("user", "c"), m("assistant", "d")]


def answers(view):
    return [view.text[a:b] for a, b in view.answers]


def test_a_plain_template_needs_one_view_with_every_answer():
    (view,) = views(TWO, chatml)
    assert view.text == chatml(TWO, False)
    assert answers(view) == ["b<end>\n", "d<end>\n"]
    assert view.messages == TWO


def test_a_template_that_rewrites_history_gets_a_view_for_each_answer():
    last, first = views(TWO, thinking)
    assert answers(last) == ["<think></think>d<end>\n"]
    assert "<think></think>b" not in last.text
    assert answers(first) == ["<think></think>b<end>\n"]
    assert first.messages == TWO[:2]


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "tool"]), st.text(max_size=5)), min_size=1, max_size=6
    )
)
def test_every_answer_is_trained_once_and_in_the_context_of_its_prompt(turns):
    messages = [
        x for role, text in turns for x in (m(role, text), m("assistant", text + "!", why=text))
    ]
    for template in (chatml, thinking):
        found = views(messages, template)
        assert sum(len(view.answers) for view in found) == len(turns)
        for view in found:
            assert view.text == template(view.messages, False)
            prompts = [template(messages[:n], True) for n in range(1, len(messages), 2)]
            assert all(view.text[:a] in prompts for a, _ in view.answers)


def test_answers_of_weight_zero_are_context_alone():
    (view,) = views([m("user", "a"), m("assistant", "b", weight=0), *TWO[2:]], chatml)
    assert answers(view) == ["d<end>\n"]
    (view,) = views([*TWO[:3], m("assistant", "d", weight=0)], chatml)
    assert view.messages == TWO[:2]
    assert views([m("user", "a"), m("assistant", "b", weight=0)], chatml) == []


def test_a_prompt_that_no_answer_begins_with_is_refused():
    def forgetful(messages, ask):
        return chatml(messages, ask) + "<think>\n" * ask

    with pytest.raises(TemplateError) as error:
        views(TWO[:2], forgetful)
    assert error.value.message == (
        "message 2: the chat template asks for this answer with ...'<think>\\n' but shows the answer as "
        "...'b<end>\\n' (they part at character 24): a model trained on the second would be served with the first"
    )
    assert "model.chat_template" in error.value.hint


# One token per character keeps these readable; '.' is the stop token, whose id is 46.
def characters(text):
    return [ord(c) for c in text], [(n, n + 1) for n in range(len(text))]


def masked(text, start, end, tokens=None):
    ids, offsets = characters(text) if tokens is None else tokens
    found = mask(ids, offsets, text, [Span(start, end)], {46})
    return found


def test_the_stop_token_is_trained_and_the_newline_after_it_is_not():
    found = masked("q>hi.\n", 2, 6)
    assert (found.ranges, found.stops, found.joined) == ([(2, 5)], [4], 0)


def test_a_stop_token_inside_an_answer_does_not_end_it():
    assert masked("q>h.i.\n", 2, 7).ranges == [(2, 6)]


def test_without_a_stop_token_the_whole_answer_is_trained():
    found = masked("q>hi\n", 2, 5)
    assert (found.ranges, found.stops) == ([(2, 5)], [])


def test_a_token_that_spans_prompt_and_answer_is_not_trained_and_counted():
    found = masked("q>hi.", 2, 5, ([1, 2, 3, 46], [(0, 1), (1, 3), (3, 4), (4, 5)]))
    assert (found.ranges, found.joined) == ([(2, 4)], 1)


def test_a_token_that_spans_answer_and_what_follows_is_not_trained():
    found = masked("q>hi\nq", 2, 4, ([1, 2, 3, 4, 5], [(0, 1), (1, 2), (2, 3), (3, 5), (5, 6)]))
    assert found.ranges == [(2, 3)]


def test_all_bytes_of_a_character_are_trained():
    tokens = ([1, 2, 7, 8, 9, 46], [(0, 1), (1, 2), (2, 3), (2, 3), (2, 3), (3, 4)])
    assert masked("q>é.", 2, 4, tokens).ranges == [(2, 6)]


def test_an_answer_that_was_cut_away_has_no_range():
    ids, offsets = characters("q>")
    assert mask(ids, offsets, "q>hi.", [Span(2, 5)], {46}).ranges == []


# --- questions and references ---------------------------------------------------------------------


def test_the_question_is_everything_before_the_last_answer():
    assert prompt_messages({"id": "x", "messages": TWO}) == TWO[:3]


def test_a_system_prompt_is_added_only_where_there_is_none():
    assert with_system(TWO, "s")[0] == m("system", "s")
    assert with_system([m("system", "own"), *TWO], "s")[0]["content"] == "own"
    assert with_system(TWO, None) == TWO


def test_plain_text_asks_nothing():
    with pytest.raises(DataError, match="row x is plain text: it has no question"):
        prompt_messages({"id": "x", "text": "a"})


def test_the_reference_is_the_last_answer_or_its_tool_calls():
    assert reference({"messages": TWO}) == "d"
    assert reference({"text": "a"}) == "a"
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    row = {"messages": [TWO[0], m("assistant", "", tool_calls=[call])]}
    assert reference(row) == '[{"name": "f", "arguments": {"a": 1}}]'
