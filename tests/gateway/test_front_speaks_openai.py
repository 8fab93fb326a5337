"""The openai client and LangChain, unchanged, against the front."""

import json

import openai
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


class Place(BaseModel):
    city: str


@pytest.fixture
def client(front):
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def say(text):
    return [{"role": "user", "content": text}]


def test_chat_answers_under_the_public_name(client):
    answer = client.chat.completions.create(model="tickets", messages=say("hi"))
    assert answer.model == "tickets"
    assert answer.choices[0].message.content == "w0 w1 w2 w3 w4 w5 "
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 6)


def test_headers_say_who_answered(client):
    raw = client.chat.completions.with_raw_response.create(
        model="tickets", messages=say("hi"), extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.headers["x-toolkit-model-version"] == "1a2b3c4d5e6f7081"
    assert raw.headers["x-toolkit-run-id"] == "run-1"
    assert raw.headers["x-toolkit-target"] == "stable"
    assert raw.request_id == "mine-1"


@pytest.mark.parametrize("style", ["vllm", "sglang", "spaced"])
@pytest.mark.parametrize("model", ["tickets", "tickets-s", "demo-base"])
def test_stream_has_every_token_and_no_usage_that_was_not_asked_for(client, style, model):
    chunks = list(
        client.chat.completions.create(
            model=model, messages=say(json.dumps({"style": style, "tokens": 5})), stream=True
        )
    )
    assert {chunk.model for chunk in chunks} == {model}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "w0 w1 w2 w3 w4 "
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_with_usage_ends_with_it(client):
    chunks = list(
        client.chat.completions.create(
            model="tickets", messages=say("hi"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6


def test_tools_come_whole_and_in_pieces(client):
    answer = client.chat.completions.create(model="tickets", messages=say("hi"), tools=[WEATHER])
    call = answer.choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)["city"]) == ("weather", "Paris")
    chunks = client.chat.completions.create(
        model="tickets", messages=say("hi"), tools=[WEATHER], stream=True
    )
    calls = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
    assert "".join(c[0].function.arguments or "" for c in calls) == '{"city": "Paris"}'


def test_structured_output_is_parsed(client, upstream):
    answer = client.chat.completions.parse(
        model="tickets", messages=say("hi"), response_format=Place
    )
    assert answer.choices[0].message.parsed == Place(city="Paris")
    asked = upstream.ask("/seen")["seen"][-1]["body"]
    assert asked["response_format"]["json_schema"]["schema"]["properties"] == {
        "city": {"title": "City", "type": "string"}
    }


def test_logprobs_and_many_choices_pass(client):
    answer = client.chat.completions.create(
        model="tickets", messages=say("hi"), n=3, logprobs=True, top_logprobs=1
    )
    assert len(answer.choices) == 3
    assert answer.choices[2].logprobs.content[0].top_logprobs[0].logprob == -0.5
    chunks = client.chat.completions.create(
        model="tickets", messages=say("hi"), n=2, logprobs=True, stream=True
    )
    assert {c.choices[0].index for c in chunks} == {0, 1}


def test_images_pass_as_data_urls(client, upstream):
    content = [
        {"type": "text", "text": "what is it?"},
        {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
    ]
    client.chat.completions.create(model="tickets", messages=[{"role": "user", "content": content}])
    assert upstream.ask("/seen")["seen"][-1]["body"]["messages"][0]["content"] == content


def test_completions_echo_logprobs_and_several_prompts(client):
    answer = client.completions.create(
        model="tickets", prompt="Once", echo=True, logprobs=2, max_tokens=3
    )
    assert answer.choices[0].text == "Oncew0 w1 w2 "
    assert answer.choices[0].logprobs.top_logprobs[0]["error"] == -3.0
    assert client.completions.create(model="tickets", prompt=["a", "b"]).model == "tickets"
    chunks = list(
        client.completions.create(model="tickets", prompt=[1, 2], stream=True, logprobs=2)
    )
    assert chunks[0].choices[0].logprobs.top_logprobs[0]["usage"] == -4.0


def test_embeddings_and_models(client):
    assert len(client.embeddings.create(model="demo-base", input=["a", "b"]).data) == 2
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"tickets", "demo-base", "tickets-s"}
    assert listed["tickets"].max_model_len == 1024
    assert (listed["tickets"].kind, listed["tickets"].version) == ("adapter", "1a2b3c4d5e6f7081")
    assert all(client.models.retrieve(name) == model for name, model in listed.items())


@pytest.mark.parametrize(
    ("script", "error", "says"),
    [
        (
            {"status": 400, "text": "temperature is odd for tickets@1a2b3c4d5e6f7081"},
            openai.BadRequestError,
            "odd for tickets",
        ),
        ({"status": 400, "style": "sglang", "text": "no"}, openai.BadRequestError, "no"),
        (
            {"status": 500, "text": "Traceback in /secret/path"},
            openai.InternalServerError,
            "The engine failed",
        ),
        ({"status": 503}, openai.InternalServerError, "overloaded"),
        ({"status": 404}, openai.InternalServerError, "does not serve 'tickets'"),
        ({"status": 401}, openai.InternalServerError, "The engine failed"),
    ],
)
def test_engine_errors_are_openais_exceptions(client, script, error, says):
    with pytest.raises(error) as caught:
        client.chat.completions.create(model="tickets", messages=say(json.dumps(script)))
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "1a2b3c4d" not in str(caught.value)


def test_too_long_a_prompt_has_openais_code(client):
    text = "This model's maximum context length is 1024 tokens. However, you requested 2000."
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tickets", messages=say(json.dumps({"status": 400, "text": text}))
        )
    assert caught.value.code == "context_length_exceeded"


def test_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=say("hi"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.type == "invalid_request_error"


def test_error_inside_a_stream_raises(client):
    stream = client.chat.completions.create(
        model="tickets", messages=say('{"end": "error"}'), stream=True
    )
    with pytest.raises(openai.APIError, match="tickets is ill"):
        list(stream)


def test_langchain_chats_streams_and_binds_tools(front):
    chat = ChatOpenAI(base_url=f"{front.url}/v1", api_key="none", model="tickets", max_retries=0)

    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return city

    assert chat.invoke("hi").content == "w0 w1 w2 w3 w4 w5 "
    chunks = list(chat.stream("hi", stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == "w0 w1 w2 w3 w4 w5 "
    assert sum((c.usage_metadata or {}).get("output_tokens", 0) for c in chunks) == 6
    assert chat.bind_tools([weather]).invoke("hi").tool_calls[0]["args"]["city"] == "Paris"
    assert chat.with_structured_output(Place, method="json_schema").invoke("hi") == Place(
        city="Paris"
    )


def test_langchain_completes_and_embeds(front):
    common = {"base_url": f"{front.url}/v1", "api_key": "none", "max_retries": 0}
    assert OpenAI(model="tickets", max_tokens=2, **common).invoke("Once") == "w0 w1 "
    embedder = OpenAIEmbeddings(model="demo-base", check_embedding_ctx_length=False, **common)
    assert embedder.embed_documents(["a", "b"]) == [[0.1, 0.2], [0.1, 0.2]]
