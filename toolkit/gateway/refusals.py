"""Why somebody is not let in, in the words, codes and headers that OpenAI's clients know."""

from __future__ import annotations

import math
from collections.abc import Mapping

from toolkit.gateway.openai import ApiError


def no_key() -> ApiError:
    """Nothing was shown."""
    return ApiError(
        401,
        "You didn't provide an API key. Send it in the Authorization header, as 'Authorization: Bearer KEY'.",
        type="invalid_request_error",
        headers={"WWW-Authenticate": "Bearer"},
    )


def bad_key(message: str) -> ApiError:
    """A key or a token was shown that does not open anything."""
    return ApiError(
        401,
        message,
        type="invalid_request_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
    )


def not_for_you(model: str) -> ApiError:
    """The key is good, and does not open this model. It is said whether or not the model exists."""
    return ApiError(
        403,
        f"This API key does not have access to model `{model}`.",
        type="invalid_request_error",
        code="model_not_found",
        param="model",
    )


def no_metrics() -> ApiError:
    """Metrics show the traffic of everyone: they are for keys that open every model, or that are made for them."""
    return ApiError(
        403,
        "This API key may not read /metrics. Make one that may: toolkit keys create NAME --metrics-only",
        type="invalid_request_error",
        code="not_allowed",
    )


def unknown_host(host: str) -> ApiError:
    """The name in ``Host`` is not this server's; see ``callers.py``."""
    return ApiError(
        403,
        f"This server does not answer to the name {_shown(host)}. Ask it as localhost or 127.0.0.1, or name the host "
        "in serve.front.allow.hosts: without keys it answers to the names of its own machine alone.",
        type="invalid_request_error",
        code="host_not_allowed",
    )


def unknown_origin(origin: str) -> ApiError:
    """A web page asks that is not of this machine."""
    return ApiError(
        403,
        f"Web pages of {_shown(origin)} may not ask this server. Name the origin in serve.front.allow.origins: "
        "without keys it answers to pages of its own machine alone.",
        type="invalid_request_error",
        code="origin_not_allowed",
    )


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:80]}...")


def cannot_check(what: str) -> ApiError:
    """Whether the key is good cannot be told now; the client may keep it and ask again."""
    return ApiError(
        503, f"{what} cannot be checked now.", code="auth_unavailable", headers={"Retry-After": "5"}
    )


def too_fast(kind: str, who: str, limit: int, requested: int, wait_s: float) -> ApiError:
    """A limit per minute is used up; ``kind`` is ``requests`` or ``tokens``."""
    short = f"{kind} per min ({'RPM' if kind == 'requests' else 'TPM'})"
    numbers = f"Limit {limit}, Requested {requested}. Please try again in {duration(wait_s)}."
    text = f"Rate limit reached for {who} on {short}: {numbers}"
    return _limited(kind, text, retry_after(wait_s))


def too_large(who: str, limit: int, requested: int) -> ApiError:
    """One request wants more tokens than a whole minute has: waiting does not help, and clients are told so."""
    numbers = f"Limit {limit}, Requested {requested}. The prompt and max_tokens must be reduced."
    text = f"Request too large for {who} on tokens per min (TPM): {numbers}"
    return _limited("tokens", text, {"x-should-retry": "false"})


def _limited(kind: str, text: str, headers: Mapping[str, str]) -> ApiError:
    return ApiError(429, text, type=kind, code="rate_limit_exceeded", headers=headers)


def overloaded(limit: int) -> ApiError:
    """As many requests are open as the server takes."""
    return ApiError(
        503,
        f"The server is overloaded: {limit} requests are open. Please try again later.",
        code="overloaded",
        headers=retry_after(1.0),
    )


def retry_after(seconds: float) -> dict[str, str]:
    """``Retry-After`` in whole seconds, and OpenAI's own in milliseconds, which its client prefers."""
    return {
        "Retry-After": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(max(1, math.ceil(seconds * 1000))),
    }


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``120ms``, ``8.64s``, ``6m0s``."""
    ms = math.ceil(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    shown = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{shown}" if minutes else shown
