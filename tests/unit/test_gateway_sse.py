"""Streams are the same for the client, wherever the network cut them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.gateway.openai import ApiError
from toolkit.gateway.sse import MAX_EVENT, EventStream, rename, usage_of

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
TRICKS = st.sampled_from(
    [
        '"model":"tickets@1"',
        '"usage":{',
        "data: [DONE]",
        '{"error": 1}',
        "\n\n",
        "\r\n\r\n",
        "[DONE]",
        "\\",
        "\x85\u2028",
    ]
)
WORDS = st.lists(TEXT | TRICKS, max_size=8)
CUTS = st.lists(st.integers(1, 40), max_size=60)
STYLES = st.sampled_from([(",", ":"), (", ", ": ")])


def event(values, style=(",", ":"), end="\n\n"):
    return f"data: {json.dumps(values, separators=style, ensure_ascii=False)}{end}".encode()


def chunk(word, name="tickets@1", **more):
    return {"id": "x", "model": name, "choices": [{"index": 0, "delta": {"content": word}}], **more}


def usage(name="tickets@1"):
    return {
        "id": "x",
        "model": name,
        "choices": [],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }


def pieces(data, cuts):
    for size in cuts:
        if data:
            yield data[:size]
            data = data[size:]
    if data:
        yield data


def through(data, cuts=(), hides=True, name="tickets@1"):
    stream = EventStream(name, "tickets", hides_usage=hides)
    return stream, b"".join(stream.feed(piece) for piece in pieces(data, cuts))


def told(data):
    return [
        json.loads(line[6:]) for line in data.decode().split("\n\n") if line.startswith("data: {")
    ]


@given(WORDS, CUTS, STYLES, st.sampled_from(["\n\n", "\r\n\r\n"]), st.booleans())
def test_every_cut_gives_the_same_words_under_the_public_name(words, cuts, style, end, hides):
    data = b"".join(event(chunk(word), style, end) for word in words)
    data += event(usage(), style, end) + f"data: [DONE]{end}".encode()
    stream, out = through(data, cuts, hides)
    events = told(out)
    assert [e["choices"][0]["delta"]["content"] for e in events if e["choices"]] == words
    assert {e["model"] for e in events} <= {"tickets"}
    assert [e["usage"]["prompt_tokens"] for e in events if not e["choices"]] == (
        [] if hides else [3]
    )
    assert stream.usage == {"prompt_tokens": 3, "completion_tokens": 2}
    assert stream.done
    assert stream.error is None
    assert out.endswith(b"data: [DONE]\n\n")


@given(st.binary(max_size=200), CUTS)
def test_any_bytes_are_passed_or_kept_and_never_raise(data, cuts):
    stream, out = through(data, cuts)
    assert len(out) <= len(data) + 200
    assert stream.usage is None or isinstance(stream.usage, dict)


def test_same_name_passes_untouched():
    data = event(chunk("a", "base")) + b": a comment\n\n" + b"data: [DONE]\n\n"
    stream = EventStream("base", "base", hides_usage=True)
    assert stream.feed(data) == data


def test_usage_beside_choices_is_kept():
    data = event(chunk("a", usage={"prompt_tokens": 1, "completion_tokens": 1}))
    stream, out = through(data)
    assert told(out)[0]["usage"]["prompt_tokens"] == 1
    assert stream.usage["completion_tokens"] == 1


def test_null_usage_and_logprobs_named_like_keys_are_no_usage():
    data = event(chunk("a", usage=None, top_logprobs=[{"error": -1.0, "usage": -2.0}]))
    stream, out = through(data)
    assert (stream.usage, stream.error) == (None, None)
    assert told(out)[0]["top_logprobs"] == [{"error": -1.0, "usage": -2.0}]


@pytest.mark.parametrize("first", [True, False])
def test_error_of_the_engine_is_openais_and_names_the_public_model(first):
    error = {
        "object": "error",
        "message": "tickets@1 is ill",
        "type": "BadRequestError",
        "code": 400,
    }
    data = (b"" if first else event(chunk("a"))) + event({"error": error}) + b"data: [DONE]\n\n"
    stream, out = through(data)
    assert told(out)[-1]["error"] == {
        "message": "tickets is ill",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert stream.failed_at_once is first


def test_unfinished_event_is_never_shown():
    stream, out = through(event(chunk("a")) + b'data: {"choi')
    assert len(told(out)) == 1
    assert not stream.done


def test_event_without_an_end_is_refused():
    stream = EventStream("a", "b", hides_usage=False)
    assert stream.feed(b"x" * MAX_EVENT) == b""
    with pytest.raises(ApiError, match="an event without an end"):
        stream.feed(b"x")


@given(TEXT | TRICKS, STYLES)
def test_whole_answer_keeps_its_text_and_counts(word, style):
    values = chunk(word) | {
        "usage": {"prompt_tokens": 5, "completion_tokens": 1, "details": {"a": 1}},
        "metrics": None,
    }
    body = json.dumps(values, separators=style, ensure_ascii=False).encode()
    renamed = json.loads(rename(body, "tickets@1", "tickets"))
    assert renamed == values | {"model": "tickets"}
    assert usage_of(body) == values["usage"]


def test_answer_without_counts_has_none():
    assert usage_of(b'{"object": "list"}') == {}
    assert usage_of(b'{"usage": nonsense') == {}
    assert usage_of(b'{"usage": null}') == {}
