"""Loss masks, token by token, with real tokenizers. Runs in the train environment."""

import pytest

pytest.importorskip("transformers", reason="runs in the train environment")

from templates import (
    CHATML,
    CHATML_MARKED,
    LLAMA3,
    NO_STOP,
    OPEN_THINKING,
    STRICT,
    THINKING,
    tokenizer,
)

from toolkit.data.collect import Row
from toolkit.data.encode import Encoder, keep_spaces_in_offsets
from toolkit.data.formats import conversation
from toolkit.data.ledger import SplitCounts
from toolkit.data.render import TemplateError, prompt_ids, reference
from toolkit.errors import DataError

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("default")]


def m(role, content="", **more):
    return {"role": role, "content": content, **more}


ONE = [m("user", "Where is my order?"), m("assistant", "It is on its way.")]
MANY = [
    m("system", "Be short."),
    m("user", "Grüße! 🤖"),
    m("assistant", "Hello there!\n\n  two spaces, 東京 🤖"),
    m("user", "ticket 12345"),
    m("assistant", '{"id": 12345}'),
]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"order": 12}}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
USE = [
    m("user", "Find order 12"),
    m("assistant", tool_calls=[CALL]),
    m("tool", "on floor three"),
    m("assistant", "It is on floor three."),
    m("user", "Thanks"),
    m("assistant", "Welcome."),
]


def encode(tok, messages, *, tools=None, system=None, every_answer=True):
    row = Row("0" * 16, conversation(messages, tools), "a.jsonl:1")
    counts = SplitCounts()
    encoder = Encoder(tok, [tok.eos_token_id], system, every_answer=every_answer)
    return list(encoder.encode([row], counts, drop_invalid=False)), counts


def trained(tok, one):
    """Text of each run of trained tokens."""
    runs, run = [], []
    for token, on in zip([*one.ids.tolist(), None], [*one.trained.tolist(), False], strict=True):
        if on:
            run.append(token)
        elif run:
            runs.append(tok.decode(run))
            run = []
    return runs


def answers(messages, stop):
    return [x["content"] + stop for x in messages if x["role"] == "assistant"]


def check(tok, messages, stop):
    """One sequence, whose ids are the template's own, whose answers and nothing else are trained."""
    (one,), counts = encode(tok, messages)
    assert one.ids.tolist() == tok.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert trained(tok, one) == answers(messages, stop)
    assert len(one.stops) == one.turns == len(answers(messages, stop))
    asked = prompt_ids(tok, {"messages": messages})
    assert one.ids.tolist()[: len(asked)] == asked
    assert one.trained.tolist()[len(asked)]
    assert not one.trained[len(asked) - 1]
    assert counts.extra_sequences == 0


@pytest.mark.parametrize("messages", [ONE, MANY], ids=["one", "many"])
@pytest.mark.parametrize(
    ("template", "stop"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>")], ids=["chatml", "llama3"]
)
def test_each_template_trains_answers_and_their_stop_token(template, stop, messages):
    check(tokenizer(template), messages, stop)


@pytest.mark.parametrize("messages", [ONE, MANY], ids=["one", "many"])
def test_the_mask_equals_that_of_a_template_with_generation_marks(messages):
    tok = tokenizer(CHATML_MARKED)
    own = tok.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (one,), _ = encode(tok, messages)
    assert one.ids.tolist() == own["input_ids"]
    assert one.trained.astype(int).tolist() == own["assistant_masks"]


def test_a_thinking_template_trains_each_answer_as_it_is_given():
    tok = tokenizer(THINKING)
    messages = [
        m("user", "one"),
        m("assistant", "first", reasoning_content="why first"),
        m("user", "two"),
        m("assistant", "second"),
    ]
    found, counts = encode(tok, messages)
    assert [trained(tok, one) for one in found] == [
        ["<think>\n\n</think>\n\nsecond<|im_end|>"],
        ["<think>\nwhy first\n</think>\n\nfirst<|im_end|>"],
    ]
    assert "why first" not in tok.decode(found[0].ids)  # history is shown as the server shows it
    assert counts.extra_sequences == 1
    for one in found:
        ids = one.ids.tolist()
        assert ids == tok.apply_chat_template(
            one.body["messages"], tokenize=True, return_dict=False
        )
        asked = prompt_ids(tok, one.body)
        assert ids[: len(asked)] == asked


def test_a_heldout_conversation_of_a_thinking_template_stays_one_row():
    tok = tokenizer(THINKING)
    (one,), _ = encode(tok, USE, tools=TOOLS, every_answer=False)
    assert one.body["messages"] == USE
    assert reference(one.body) == "Welcome."
    assert trained(tok, one) == ["<think>\n\n</think>\n\nWelcome.<|im_end|>"]


def test_tool_calls_are_trained_and_tool_results_are_not():
    tok = tokenizer(THINKING)
    found, _ = encode(tok, USE, tools=TOOLS)
    runs = [run for one in found for run in trained(tok, one)]
    call = '<tool_call>{"name": "find", "arguments": {"order": 12}}</tool_call><|im_end|>'
    assert sorted(runs) == sorted(
        [
            "<think>\n\n</think>\n\n" + call,
            "<think>\n\n</think>\n\nIt is on floor three.<|im_end|>",
            "<think>\n\n</think>\n\nWelcome.<|im_end|>",
        ]
    )
    for one in found:
        own = tok.apply_chat_template(
            one.body["messages"], tools=TOOLS, tokenize=True, return_dict=False
        )
        assert one.ids.tolist() == own
        assert tok.decode(own).startswith('<|im_start|>system\n{"type": "function"')


def test_a_template_that_opens_thinking_only_in_the_prompt_is_refused():
    with pytest.raises(
        TemplateError, match=r"a.jsonl:1: message 2: the chat template asks .*'<think>\\n'"
    ):
        encode(tokenizer(OPEN_THINKING), ONE)


def test_a_row_that_the_template_refuses_is_named_or_counted():
    tok = tokenizer(STRICT)
    messages = [m("user", "a"), m("user", "b"), m("assistant", "c")]
    with pytest.raises(
        DataError, match=r"a.jsonl:1: the chat template refuses the row: roles must alternate"
    ):
        encode(tok, messages)
    counts = SplitCounts()
    row = Row("0" * 16, conversation(messages), "a.jsonl:1")
    assert not list(
        Encoder(tok, [], None, every_answer=True).encode([row], counts, drop_invalid=True)
    )
    assert counts.invalid == 1


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_template_without_stop_token_shows_in_the_counts_and_joined_tokens_are_not_trained(
    trim_offsets,
):
    tok = tokenizer(NO_STOP, trim_offsets=trim_offsets)
    keep_spaces_in_offsets(tok.backend_tokenizer)
    (one,), _ = encode(tok, [m("user", "a"), m("assistant", "printer order")])
    assert one.stops == ()
    assert one.joined == 1  # " printer" is one token: its space stands in the prompt
    assert trained(tok, one) == [" order\n"]


def test_the_system_prompt_of_the_recipe_is_trained_with_and_kept():
    tok = tokenizer(CHATML)
    (one,), _ = encode(tok, ONE, system="Answer in JSON.")
    assert one.body["messages"][0] == m("system", "Answer in JSON.")
    assert "Answer in JSON." in tok.decode(one.ids)
    assert "Be kind." not in tok.decode(one.ids)


def test_plain_text_is_trained_whole_and_ends():
    tok = tokenizer(CHATML)
    row = Row("0" * 16, {"text": "Hello there!"}, "a.jsonl:1")
    (one,) = Encoder(tok, [], None, every_answer=True).encode(
        [row], SplitCounts(), drop_invalid=False
    )
    assert tok.decode(one.ids) == "Hello there!<|im_end|>"
    assert one.trained.all()


def test_ids_that_differ_from_the_templates_own_stop_the_run():
    tok = tokenizer(CHATML + "{{ range(1, 99999) | random }}")
    with pytest.raises(DataError, match=r"a.jsonl:1: token|message 2: the chat template"):
        encode(tok, ONE)
