"""What a request may say, and how it is told what it may not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params

from toolkit.gateway import caps
from toolkit.gateway.openai import ApiError
from toolkit.gateway.requests import BODIES, ChatBody, CompletionBody, EmbeddingBody
from toolkit.recipe.front import AllowSection, LimitsSection

CHAT, TEXT, VECTOR = BODIES
HI = [{"role": "user", "content": "hi"}]
PIXEL = "data:image/png;base64,AAAA"


def read(values, path=CHAT, limits=None, allow=None):
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    return caps.read(body, path, limits or LimitsSection(), allow or AllowSection(), 1024)


def refused(values, path=CHAT, **more):
    with pytest.raises(ApiError) as caught:
        read(values, path, **more)
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    return caught.value


def chat(**more):
    return {"model": "m", "messages": HI, **more}


def part(**part):
    return chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])


@pytest.mark.parametrize(
    ("body", "params"),
    [
        (ChatBody, chat_params.CompletionCreateParamsBase),
        (CompletionBody, completion_create_params.CompletionCreateParamsBase),
        (EmbeddingBody, embedding_create_params.EmbeddingCreateParams),
    ],
)
def test_every_field_of_the_openai_client_is_known(body, params):
    assert set(params.__annotations__) <= set(body.model_fields)


@pytest.mark.parametrize(
    "field",
    [
        "lora_path", "lora_name", "lora_request", "prompt_embeds", "input_embeds", "input_ids", "logits_processors",
        "custom_logit_processor", "custom_params", "vllm_xargs", "kv_transfer_params", "ec_transfer_params", "rid",
        "request_id", "session_params", "session_id", "bootstrap_host", "data_parallel_rank", "priority", "extra_key",
        "mm_processor_kwargs", "media_io_kwargs", "images_config", "return_hidden_states", "model_path", "guided_json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", BODIES)
def test_engine_private_fields_are_unknown(field, path):
    given_value = {CHAT: {"messages": HI}, TEXT: {"prompt": "a"}, VECTOR: {"input": "a"}}[path]
    error = refused({"model": "m", field: "/etc/passwd", **given_value}, path)
    assert (error.code, error.param) == ("unknown_parameter", field)
    assert str(error) == f"Unknown parameter: '{field}'."


@pytest.mark.parametrize(
    ("values", "path", "param", "says"),
    [
        ({"messages": HI}, CHAT, "model", "Missing required parameter: 'model'."),
        ({"model": "m"}, CHAT, "messages", "Missing required parameter"),
        (chat(messages=[]), CHAT, "messages", "at least 1 item"),
        (chat(messages="hi"), CHAT, "messages", "valid list"),
        (chat(messages=[{"content": "a"}]), CHAT, "messages.0.role", "Missing"),
        (chat(messages=[{"role": "user", "content": 3}]), CHAT, "messages.0.content", "valid"),
        (chat(model=3), CHAT, "model", "valid string"),
        (chat(model=None), CHAT, "model", "valid string"),
        (chat(n=0), CHAT, "n", "greater than or equal to 1"),
        (chat(n=True), CHAT, "n", "valid integer"),
        (chat(n=9), CHAT, "n", "9 is more than this server's limit of 8"),
        (chat(temperature="1"), CHAT, "temperature", "valid number"),
        (chat(temperature=-1), CHAT, "temperature", "greater than or equal to 0"),
        (chat(top_p=1.5), CHAT, "top_p", "less than or equal to 1"),
        (chat(stream="yes"), CHAT, "stream", "valid boolean"),
        (chat(stream_options={"include": 1}), CHAT, "stream_options.include", "Unknown parameter"),
        (chat(max_tokens=0), CHAT, "max_tokens", "greater than or equal to 1"),
        (chat(max_completion_tokens=1.5), CHAT, "max_completion_tokens", "valid integer"),
        ({"model": "m", "prompt": []}, TEXT, "prompt", "at least 1"),
        ({"model": "m", "prompt": "a", "best_of": 99}, TEXT, "best_of", "limit of 8"),
        ({"model": "m", "prompt": ["a"] * 2049}, TEXT, "prompt", "2049 inputs are more than 2048"),
        ({"model": "m", "input": ["a"] * 2049}, VECTOR, "input", "2049 inputs"),
        ({"model": "m", "input": "a", "encoding_format": "hex"}, VECTOR, "encoding_format", "'float' or 'base64'"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(values, path, param, says):
    error = refused(values, path)
    assert error.param == param
    assert says in error.message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "could not parse the JSON"),
        (b"{", "could not parse the JSON"),
        (b"[]", "must be an object"),
        (b'"a"', "must be an object"),
        (b'{"model": NaN}', "could not parse the JSON"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}]}', "unicode"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', "could not parse the JSON"),
        ('{"model": "m"}'.encode("utf-16"), "could not parse the JSON"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "recursion limit"),
        (b"[" * 100_000, "recursion limit"),
        (b'{"model":"m","messages":[{"role":"user","content":"Infinity"}],"metadata":{"a":1e999}}', "too large"),
        (b'{"model":"m","messages":[{"role":"user","content":"a"}],"seed":' + b"1" * 5000 + b"}", "number out of"),
    ],
)  # fmt: skip
def test_hostile_json_is_refused(body, says):
    assert says in refused(body).message


def test_the_word_infinity_is_no_number():
    assert read(chat(messages=[{"role": "user", "content": "NaN Infinity"}])).model == "m"


def test_what_the_engine_gets_has_each_key_once():
    body = b'{"model":"a","model":"b","messages":[{"role":"user","content":"x","content":"y"}]}'
    asked = read(body)
    assert asked.model == "b"
    assert asked.body_for("b@1") == b'{"model":"b@1","messages":[{"role":"user","content":"y"}]}'


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_texts_reach_the_engine_unchanged(text):
    asked = read(chat(messages=[{"role": "user", "content": text, "name": text}]))
    assert json.loads(asked.body_for("m@1"))["messages"] == [
        {"role": "user", "content": text, "name": text}
    ]


@pytest.mark.parametrize(
    "given_part",
    [
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "/etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "DATA:image/png;base64,AA"}},
        {"type": "image_url", "image_url": {"url": " data:image/png;base64,AA"}},
        {"type": "video_url", "video_url": {"url": "http://169.254.169.254/"}},
        {"type": "audio_url", "audio_url": {"url": "http://localhost/"}},
    ],
)
def test_media_must_be_inside_the_request(given_part):
    error = refused(part(**given_part))
    assert error.code == "not_allowed"
    assert error.param == f"messages.0.content.1.{given_part['type']}.url"
    assert "send a data: URL instead" in error.message


@pytest.mark.parametrize(
    "given_part",
    [
        {"image_url": "https://example.org/a.png"},
        {"type": "image_url", "image_url": "https://example.org/a.png"},
        {"type": "text", "text": "a", "image_url": "https://example.org/a.png"},
        {"type": "image_url", "image_url": {"url": PIXEL}, "video_url": {"url": "http://x"}},
        {"type": "image_url", "image_url": {"url": PIXEL}, "uuid": "another tenant's"},
        {"type": "image_url", "image_url": {"url": PIXEL, "path": "/x"}},
        {"type": "image_pil", "image_pil": "x"},
        {"type": "image_embeds", "image_embeds": "x"},
        {"type": "prompt_embeds", "data": "x"},
        {"type": "input_image", "image_url": "http://x"},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav;x,http://"}},
    ],
)
def test_other_ways_to_bring_media_are_refused(given_part):
    assert refused(part(**given_part)).param.startswith("messages.0.content")


@pytest.mark.parametrize(
    "given_part",
    [
        {"type": "image_url", "image_url": {"url": PIXEL, "detail": "high"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}},
        {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}},
    ],
)
def test_media_inside_the_request_pass(given_part):
    assert read(part(**given_part)).values["messages"][0]["content"][1] == given_part


def test_remote_media_pass_where_they_are_allowed_but_never_paths():
    allow = AllowSection(remote_media=True)
    read(part(type="image_url", image_url={"url": "https://example.org/a.png"}), allow=allow)
    error = refused(part(type="image_url", image_url={"url": "file:///etc/passwd"}), allow=allow)
    assert "not a data:, http: or https: URL" in error.message


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"documents": [{"text": "a"}]}, "documents"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tools": "x"}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"style": {"a": 1}}}, "chat_template_kwargs.style"),
    ],
)
def test_templates_of_requests_are_refused_unless_allowed(more, param):
    error = refused(chat(**more))
    assert (error.code, error.param) == ("not_allowed", param)
    assert "serve.front.allow.chat_template" in error.message
    read(chat(**more), allow=AllowSection(chat_template=True))


def test_thinking_can_be_switched():
    assert read(chat(chat_template_kwargs={"enable_thinking": False}))


def test_answer_longer_than_the_context_is_refused_with_openais_code():
    error = refused(chat(max_tokens=1025))
    assert (error.code, error.param) == ("context_length_exceeded", "max_tokens")
    assert "maximum context length is 1024 tokens" in error.message
    read(chat(max_tokens=1024))


def test_cap_of_tokens_is_a_limit_and_the_default():
    limits = LimitsSection(max_tokens=100)
    assert "limit of 100" in refused(chat(max_tokens=101), limits=limits).message
    assert read(chat(), limits=limits).values["max_completion_tokens"] == 100
    assert "max_completion_tokens" not in read(chat(max_tokens=7), limits=limits).values
    assert read({"model": "m", "prompt": "a"}, TEXT, limits=limits).values["max_tokens"] == 16
    assert "max_tokens" not in read({"model": "m", "prompt": "a"}, TEXT).values


@pytest.mark.parametrize(
    ("options", "hides", "sent"),
    [
        (None, True, {"include_usage": True}),
        ({"include_usage": True}, False, {"include_usage": True}),
        ({"include_usage": False, "continuous_usage_stats": True}, True, {"include_usage": True}),
        ({"include_usage": True, "continuous_usage_stats": True}, False,
         {"include_usage": True, "continuous_usage_stats": True}),
        ({"include_obfuscation": False}, True, {"include_obfuscation": False, "include_usage": True}),
    ],
)  # fmt: skip
def test_streams_are_always_counted(options, hides, sent):
    asked = read(chat(stream=True, stream_options=options))
    assert asked.hides_usage is hides
    assert json.loads(asked.body_for("m"))["stream_options"] == sent


def test_whole_answers_get_no_stream_options():
    assert "stream_options" not in json.loads(read(chat()).body_for("m"))


WHY = {"prompt_logprobs": "gives no logprobs of the prompt"}


def completion(**more):
    return {"model": "m", "prompt": "x"} | more


@pytest.mark.parametrize(
    ("path", "values", "param"),
    [
        ("/v1/completions", completion(echo=True, logprobs=1), "echo"),
        ("/v1/completions", completion(echo=True, logprobs=0), "echo"),
        ("/v1/completions", completion(prompt_logprobs=0), "prompt_logprobs"),
        (CHAT, chat(prompt_logprobs=5), "prompt_logprobs"),
        (CHAT, chat(echo=True, logprobs=True, top_logprobs=2), "echo"),
    ],
)
def test_what_would_end_the_engine_is_refused_where_it_would(path, values, param):
    body = json.dumps(values).encode()
    with pytest.raises(ApiError) as error:
        caps.read(body, path, LimitsSection(), AllowSection(), 1024, refuses=WHY)
    assert (error.value.status, error.value.code, error.value.param) == (
        400, "not_supported", param,
    )  # fmt: skip
    assert error.value.message == (
        f"'{param}' is not supported: this server gives no logprobs of the prompt."
    )
    assert caps.read(body, path, LimitsSection(), AllowSection(), 1024).model == "m"


@pytest.mark.parametrize(
    "values", [completion(echo=True), completion(logprobs=1), completion(echo=False, logprobs=1)]
)
def test_an_echo_or_logprobs_alone_pass(values):
    body = json.dumps(values).encode()
    assert caps.read(body, "/v1/completions", LimitsSection(), AllowSection(), 1024, refuses=WHY)
