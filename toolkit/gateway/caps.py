"""From the bytes of a request to what the engine is asked, or to the reason why not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json, to_json

from toolkit.gateway.openai import ApiError
from toolkit.gateway.requests import BODIES, Body, ChatBody, CompletionBody, Json
from toolkit.gateway.table import PROMPT_LOGPROBS
from toolkit.recipe.front import AllowSection, LimitsSection

NOTHING: Mapping[str, str] = {}
MAX_INPUTS = 2048
"""Texts in one request to completions or embeddings, as at OpenAI."""

TEMPLATE_KEYS = frozenset(
    {"chat_template", "tokenize", "tools", "documents", "messages", "conversation", "add_generation_prompt",
     "continue_final_message", "return_dict", "return_tensors", "padding", "truncation", "max_length", "template",
     "tokenizer", "bos_token", "eos_token"}
)  # fmt: skip
"""Names in ``chat_template_kwargs`` that would replace what the server renders with."""


@dataclass(frozen=True)
class Asked:
    """A request that may be served.

    Attributes:
        values: Its JSON; ``model`` is still the public name.
        model: The public name.
        stream: Whether the answer is an event stream.
        hides_usage: The client did not ask for usage in its stream: what the engine tells us is not for it.
    """

    values: Json
    model: str
    stream: bool
    hides_usage: bool

    def body_for(self, model_id: str) -> bytes:
        """What goes to the engine, which knows the model as ``model_id``."""
        values = self.values | {"model": model_id}
        if self.hides_usage:
            options = {
                k: v
                for k, v in (values.get("stream_options") or {}).items()
                if k != "continuous_usage_stats"
            }
            values["stream_options"] = options | {"include_usage": True}
        return to_json(values)


def read(
    body: bytes,
    path: str,
    limits: LimitsSection,
    allow: AllowSection,
    max_length: int,
    *,
    refuses: Mapping[str, str] = NOTHING,
) -> Asked:
    """Read the body of a request to ``path``.

    Args:
        body: Its bytes.
        path: One of :data:`toolkit.gateway.requests.BODIES`.
        limits: Of the one who asks.
        allow: What the recipe allows.
        max_length: Context of the engine, tokens.
        refuses: What the engine cannot answer; see :class:`toolkit.gateway.table.Table`.

    Raises:
        ApiError: 400, with the field that is wrong as ``param``.
    """
    values = _json(body)
    try:
        request = BODIES[path].model_validate(values)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_context=False), values) from None
    _finite(values)
    _sizes(values, limits, max_length)
    if isinstance(request, ChatBody):
        _template(request, allow)
        _media(request, allow)
    _answerable(request, refuses)
    _default_max_tokens(request, values, limits)
    stream = bool(values.get("stream"))
    options = values.get("stream_options") or {}
    return Asked(values, request.model, stream, stream and not options.get("include_usage"))


def _json(body: bytes) -> Json:
    try:
        values: Any = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"We could not parse the JSON body of your request: {error}.") from None
    if not isinstance(values, dict):
        raise ApiError(400, "The JSON body of your request must be an object.")
    return values


def _finite(values: Json) -> None:
    """Refuse numbers such as 1e999, which read as infinity and cannot be written as JSON again."""
    if b"Infinity" not in to_json(values, inf_nan_mode="constants"):
        return
    try:
        json.dumps(values, allow_nan=False)  # the word may stand in a text
    except ValueError:
        raise ApiError(400, "A number in your request is too large for JSON.") from None


def _refusal(errors: list[ErrorDetails], values: Json) -> ApiError:
    """Say one problem the way OpenAI does: an unknown field, or the one deepest inside (unions report every member)."""
    unknown = [e for e in errors if e["type"] == "extra_forbidden"]
    error = unknown[0] if unknown else max(errors, key=lambda e: len(_location(e, values)))
    param = ".".join(str(part) for part in _location(error, values))
    if error["type"] == "extra_forbidden":
        return ApiError(
            400, f"Unknown parameter: '{param}'.", code="unknown_parameter", param=param
        )
    if error["type"] == "missing":
        return ApiError(
            400,
            f"Missing required parameter: '{param}'.",
            code="missing_required_parameter",
            param=param,
        )
    code = "invalid_type" if error["type"].endswith("_type") else "invalid_value"
    return ApiError(400, f"Invalid '{param}': {error['msg']}.", code=code, param=param)


def _location(error: ErrorDetails, values: Any) -> list[str | int]:
    """The path of the field, without the names of union members that pydantic puts in between."""
    found: list[str | int] = []
    for part in error["loc"]:
        if isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
            found.append(part)
        elif (
            isinstance(values, dict) and isinstance(part, str) and not _is_tag(part, values, found)
        ):
            if part in values:
                values = values[part]
                found.append(part)
            elif error["type"] == "missing" and part == error["loc"][-1]:
                found.append(part)
    return found


def _is_tag(part: str, values: Json, found: list[str | int]) -> bool:
    return bool(found) and isinstance(found[-1], int) and values.get("type") == part


def _sizes(values: Json, limits: LimitsSection, max_length: int) -> None:
    for name in ("n", "best_of"):
        asked = values.get(name)
        if asked is not None and asked > limits.max_n:
            raise ApiError(
                400,
                f"Invalid '{name}': {asked} is more than this server's limit of {limits.max_n}.",
                code="integer_above_max_value",
                param=name,
            )
    for name in ("prompt", "input"):
        inputs = values.get(name)
        if isinstance(inputs, list) and not isinstance(inputs[0], int) and len(inputs) > MAX_INPUTS:
            raise ApiError(
                400,
                f"Invalid '{name}': {len(inputs)} inputs are more than {MAX_INPUTS} in one request.",
                code="array_above_max_length",
                param=name,
            )
    for name in ("max_tokens", "max_completion_tokens"):
        _length(name, values.get(name), limits, max_length)


def _length(name: str, asked: int | None, limits: LimitsSection, max_length: int) -> None:
    if asked is None:
        return
    if limits.max_tokens is not None and asked > limits.max_tokens:
        raise ApiError(
            400,
            f"Invalid '{name}': {asked} is more than this server's limit of {limits.max_tokens}.",
            code="integer_above_max_value",
            param=name,
        )
    if asked > max_length:
        raise ApiError(
            400,
            f"This model's maximum context length is {max_length} tokens, prompt and answer together; "
            f"you asked for {asked} in the answer. Ask for less in '{name}'.",
            code="context_length_exceeded",
            param=name,
        )


def _default_max_tokens(request: Body, values: Json, limits: LimitsSection) -> None:
    """Give a request without a length the cap; without a cap the engine's default stays (the context, or 16)."""
    cap = limits.max_tokens
    if cap is None or values.get("max_tokens") or values.get("max_completion_tokens"):
        return
    if isinstance(request, ChatBody):
        values["max_completion_tokens"] = cap
    elif isinstance(request, CompletionBody):
        values["max_tokens"] = min(cap, 16)  # OpenAI's default


def _answerable(request: Body, refuses: Mapping[str, str]) -> None:
    """Refuse what the engine cannot answer, or would end of."""
    why, param = refuses.get(PROMPT_LOGPROBS), asks_prompt_logprobs(request)
    if why is not None and param is not None:
        raise ApiError(
            400,
            f"'{param}' is not supported: this server {why}.",
            code="not_supported",
            param=param,
        )


def asks_prompt_logprobs(request: Body) -> str | None:
    """The field that makes an engine score the prompt: vLLM reads ``echo`` with ``logprobs`` as that."""
    if isinstance(request, ChatBody | CompletionBody):
        if request.prompt_logprobs is not None:
            return PROMPT_LOGPROBS
        scores = request.top_logprobs if isinstance(request, ChatBody) else request.logprobs
        if request.echo and scores is not None:
            return "echo"
    return None


def _template(request: ChatBody, allow: AllowSection) -> None:
    if allow.chat_template:
        return
    for name in ("chat_template", "documents"):
        if getattr(request, name) is not None:
            raise _not_allowed(name, "serve.front.allow.chat_template")
    for key, value in (request.chat_template_kwargs or {}).items():
        if key in TEMPLATE_KEYS or isinstance(value, dict | list):
            raise _not_allowed(f"chat_template_kwargs.{key}", "serve.front.allow.chat_template")


def _media(request: ChatBody, allow: AllowSection) -> None:
    schemes = ("data:", "http://", "https://") if allow.remote_media else ("data:",)
    for i, message in enumerate(request.messages):
        parts = message.content if isinstance(message.content, list) else ()
        for j, part in enumerate(parts):
            media = getattr(part, part.type) if part.type.endswith("_url") else None
            if media is not None and not media.url.startswith(schemes):
                param = f"messages.{i}.content.{j}.{part.type}.url"
                if allow.remote_media:
                    raise ApiError(
                        400,
                        f"Invalid '{param}': not a data:, http: or https: URL.",
                        code="invalid_value",
                        param=param,
                    )
                raise _not_allowed(
                    param, "serve.front.allow.remote_media", "; send a data: URL instead"
                )


def _not_allowed(param: str, setting: str, instead: str = "") -> ApiError:
    return ApiError(
        400,
        f"'{param}' is not allowed by this server ({setting} of its recipe is off){instead}.",
        code="not_allowed",
        param=param,
    )
