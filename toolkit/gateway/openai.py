"""Errors in the words of the OpenAI API, so that its clients raise the exception a user expects."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from toolkit.gateway.table import Route, Table

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}

TOO_LONG = ("maximum context length", "the model's context length")
"""What engines say of a prompt that does not fit."""


class ApiError(Exception):
    """A request that is answered with an error; it never leaves the front as a traceback.

    Attributes:
        status: HTTP status.
        message: What is wrong and what to do, for the person who wrote the client.
        type: OpenAI's name of the class of error; by status unless given.
        code: OpenAI's machine-readable reason: ``model_not_found``, ``rate_limit_exceeded``, ...
        param: The field of the request that is wrong.
        headers: More response headers, such as ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,  # noqa: A002 - OpenAI's name
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or TYPES.get(status, "server_error" if status >= 500 else TYPES[400])
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON of the answer."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode()

    def event(self) -> bytes:
        """The same as the last event of a stream that broke."""
        return b"data: " + self.body() + b"\n\n"


def engine_error(values: Any, model_id: str, public: str, status: int = 500) -> ApiError:
    """What an engine answered, in OpenAI's words: vLLM nests ``error``, SGLang does not always.

    Args:
        values: The JSON of the answer.
        model_id: The engine's name of the model, which the client does not know.
        public: The name that the client knows.
        status: HTTP status of the answer; an error inside a stream brings its own as ``code``.
    """
    found = values.get("error", values) if isinstance(values, dict) else values
    error = found if isinstance(found, dict) else {"message": found}
    code = error.get("code")
    if status == 500 and isinstance(code, int) and 400 <= code < 600:
        status = code
    message = str(error.get("message") or error.get("detail") or "").replace(model_id, public)
    if status == 404:
        return ApiError(502, f"The engine does not serve {public!r} here.", code="engine_refused")
    if status in {401, 403} or status >= 500 or status < 400 or not message:
        busy = status in {429, 503}
        return ApiError(
            503 if busy else 502 if status < 500 else status,
            "The engine is overloaded; try again later."
            if busy
            else "The engine failed on this request.",
            code="engine_overloaded" if busy else "engine_error",
            headers={"Retry-After": "1"} if busy else None,
        )
    param = error.get("param")
    too_long = any(sign in message.lower() for sign in TOO_LONG)
    return ApiError(
        429 if status == 429 else 400 if status in {400, 422} else status,
        message,
        code="context_length_exceeded" if too_long else None,
        param=param if isinstance(param, str) else None,
    )


def no_such_model(name: str) -> ApiError:
    """The public name is not served."""
    return ApiError(
        404,
        f"The model `{name}` does not exist.",
        type="invalid_request_error",
        code="model_not_found",
        param="model",
    )


def model_list(table: Table, created: float, may: Callable[[str], bool]) -> bytes:
    """The answer of ``/v1/models``: public names that the bearer may ask, with what stands behind them."""
    models = [_model(route, table, created) for route in table.routes if may(route.name)]
    return json.dumps({"object": "list", "data": models}).encode()


def one_model(name: str, table: Table, created: float, may: Callable[[str], bool]) -> bytes:
    """The answer of ``/v1/models/NAME``.

    Raises:
        ApiError: 404; a name that the bearer may not ask is as unknown as it is in the list.
    """
    route = table.route(name)
    if route is None or not may(name):
        raise no_such_model(name)
    return json.dumps(_model(route, table, created)).encode()


def _model(route: Route, table: Table, created: float) -> dict[str, Any]:
    return {
        "id": route.name,
        "object": "model",
        "created": int(created),
        "owned_by": "toolkit",
        "max_model_len": table.max_length,
        "kind": route.targets[0].kind,
        "version": route.targets[0].version,
        "targets": [
            {"label": t.label, "version": t.version, "weight": t.weight, "run_id": t.run_id}
            for t in route.targets
        ],
    }
