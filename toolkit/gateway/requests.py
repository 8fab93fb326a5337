"""What a request may say: OpenAI's fields and the sampling fields that both engines add, and nothing else.

An unknown field is an error, as it is at OpenAI. So nothing that an engine reads as a path, a URL, a tensor or code
(``lora_path``, ``prompt_embeds``, ``custom_logit_processor``, ``vllm_xargs``, ...) gets through because nobody thought
of it. Values that only the engine understands are left to it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Words = str | list[str] | None
Ids = list[Annotated[int, Field(ge=0)]]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Tokens = Annotated[int, Field(ge=1, le=2**31)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Prompts = Annotated[
    str | Annotated[Ids, Field(min_length=1)] | list[str] | list[Ids], Field(min_length=1)
]


class Part(BaseModel):
    """An object with fields of its own kind; what is not named here goes to the engine as it is."""

    model_config = ConfigDict(strict=True, extra="allow")


class Closed(BaseModel):
    """An object that has no other fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class MediaUrl(Closed):
    """Where an image, a sound or a video is; ``data:`` unless the server allows more."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class Sound(Closed):
    """A sound inside the request."""

    data: str
    format: Annotated[str, Field(pattern="^[a-z0-9]{1,16}$")]


class TextPart(Closed):
    """Words."""

    type: Literal["text"]
    text: str
    cache_control: JsonValue = None
    """What other servers read; engines do not."""
    prompt_cache_breakpoint: JsonValue = None


class RefusalPart(Closed):
    """Words of an assistant that refused."""

    type: Literal["refusal"]
    refusal: str


class ThinkingPart(Closed):
    """What an assistant thought."""

    type: Literal["thinking"]
    thinking: str


class ImagePart(Closed):
    """A picture."""

    type: Literal["image_url"]
    image_url: MediaUrl


class VideoPart(Closed):
    """A film."""

    type: Literal["video_url"]
    video_url: MediaUrl


class AudioUrlPart(Closed):
    """A sound by URL."""

    type: Literal["audio_url"]
    audio_url: MediaUrl


class AudioPart(Closed):
    """A sound."""

    type: Literal["input_audio"]
    input_audio: Sound


ContentPart = Annotated[
    TextPart | RefusalPart | ThinkingPart | ImagePart | VideoPart | AudioUrlPart | AudioPart,
    Field(discriminator="type"),
]


class Message(Part):
    """One turn; tool calls, names and reasoning go to the engine as they are."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None


class StreamOptions(Closed):
    """How a stream is told."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Body(BaseModel):
    """What every request has."""

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """Public name, as in `/v1/models`."""
    user: str | None = None


class Generate(Body):
    """What chat and completion have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Tokens | None = None
    temperature: NotNegative | None = None
    top_p: Share | None = None
    stop: Words = None
    seed: Int64 | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Number] | None = None
    response_format: dict[str, JsonValue] | None = None

    top_k: Int64 | None = None
    min_p: Share | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: NotNegative | None = None
    length_penalty: Number | None = None
    use_beam_search: bool | None = None
    stop_token_ids: Ids | None = None
    stop_regex: Words = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: Ids | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**63 - 1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1)] | None = None
    logprob_token_ids: Ids | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    structured_outputs: dict[str, JsonValue] | None = None
    regex: str | None = None
    ebnf: str | None = None
    thinking_token_budget: int | None = None
    repetition_detection: dict[str, JsonValue] | None = None
    stream_interval: Annotated[int, Field(ge=1)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None


class ChatBody(Generate):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=-1)] | None = None
    tools: list[dict[str, JsonValue]] | None = None
    tool_choice: str | dict[str, JsonValue] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, JsonValue]] | None = None
    function_call: str | dict[str, JsonValue] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    audio: dict[str, JsonValue] | None = None
    prediction: dict[str, JsonValue] | None = None
    metadata: dict[str, JsonValue] | None = None
    moderation: JsonValue = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: JsonValue = None
    prompt_cache_retention: str | None = None
    web_search_options: dict[str, JsonValue] | None = None

    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    """Plain values for the served template, such as `enable_thinking`."""
    chat_template: str | None = None
    """Only where the server allows it."""
    documents: list[dict[str, JsonValue]] | None = None
    """Only where the server allows it."""


class CompletionBody(Generate):
    """``POST /v1/completions``."""

    prompt: Prompts
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    suffix: str | None = None
    json_schema: str | None = None


class EmbeddingBody(Body):
    """``POST /v1/embeddings``."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None


BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
}

Json = dict[str, Any]
