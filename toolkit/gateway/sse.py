"""An engine's event stream on its way to the client: whole events, the public name, usage seen and hidden.

No JSON is parsed for a token. Inside a JSON string every quote is escaped, so the bytes ``"model":"x"`` and
``"usage":{`` are a key of the event and never a part of what a model wrote.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json, to_json

from toolkit.gateway.openai import ApiError, engine_error

MAX_EVENT = 32 * 2**20
"""Bytes of one event that are waited for; logprobs of many choices make events of a few hundred KiB."""


class EventStream:
    """Rewrites a stream piece by piece, wherever the pieces were cut.

    Attributes:
        events: Complete events so far; an engine sends at least one per token.
        usage: The engine's count of tokens, once it came.
        done: The engine said ``[DONE]``: nothing is missing.
        error: What the engine reported instead of more tokens.
        failed_at_once: That report was the first event.
    """

    def __init__(self, model_id: str, public: str, *, hides_usage: bool) -> None:
        self.events = 0
        self.usage: dict[str, Any] | None = None
        self.done = False
        self.error: ApiError | None = None
        self.failed_at_once = False
        self._model_id = model_id
        self._public = public
        self._hides_usage = hides_usage
        self._names = _names(model_id, public)
        self._rest = b""

    def feed(self, piece: bytes) -> bytes:
        """Take what came from the engine and return the complete events for the client.

        Raises:
            ApiError: An event has no end.
        """
        data = self._rest + piece if self._rest else piece
        if b"\r" in data:
            data = _unix(data)
        if data.endswith(b"\n\n"):
            self._rest = b""
        else:
            end = data.rfind(b"\n\n") + 2
            if end < 2:
                return self._keep(data)
            self._rest = data[end:]
            data = data[:end]
        first = not self.events
        self.events += data.count(b"\n\n")
        for old, new in self._names:
            data = data.replace(old, new)
        if b'"usage"' in data or b'"error"' in data or b"[DONE]" in data:
            return self._look(data, first)
        return data

    def _keep(self, data: bytes) -> bytes:
        if len(data) > MAX_EVENT:
            raise ApiError(502, "The engine sent an event without an end.", code="engine_broken")
        self._rest = data
        return b""

    def _look(self, data: bytes, first: bool) -> bytes:
        """The few pieces that may hold more than tokens: look into each event."""
        passed = []
        for event in data.split(b"\n\n")[:-1]:
            if (rewritten := self._event(event)) is not None:
                passed.append(rewritten + b"\n\n")
            if first and self.error is not None:
                self.failed_at_once = True
            first = False
        return b"".join(passed)

    def _event(self, event: bytes) -> bytes | None:
        text = event.removeprefix(b"data:").strip()
        if text == b"[DONE]":
            self.done = True
            return event
        if b'"usage"' not in event and b'"error"' not in event:
            return event
        try:
            values = from_json(text)
        except ValueError:
            return event  # a comment, or an event that is no JSON: the client's to judge
        if not isinstance(values, dict):
            return event
        if values.get("error"):
            self.error = engine_error(values, self._model_id, self._public)
            return b"data: " + self.error.body()
        return self._counted(values, event)

    def _counted(self, values: dict[str, Any], event: bytes) -> bytes | None:
        usage = values.get("usage")
        if not isinstance(usage, dict):
            return event
        self.usage = usage
        return None if self._hides_usage and not values.get("choices") else event


def rename(body: bytes, model_id: str, public: str) -> bytes:
    """The public name in a whole answer."""
    for old, new in _names(model_id, public):
        body = body.replace(old, new)
    return body


def usage_of(body: bytes) -> dict[str, Any]:
    """The token counts of a whole answer, without reading the rest of it; empty if there are none."""
    start = body.rfind(b'"usage":')
    if start < 0:
        return {}
    try:
        # latin-1: one character a byte, and counts are ASCII
        value, _ = json.JSONDecoder().raw_decode(body[start + 8 :].lstrip().decode("latin-1"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _names(model_id: str, public: str) -> tuple[tuple[bytes, bytes], ...]:
    """What to replace: the way that both engines write it, and with a space."""
    if model_id == public:
        return ()
    old, new = to_json(model_id), to_json(public)
    return ((b'"model":' + old, b'"model":' + new), (b'"model": ' + old, b'"model": ' + new))


def _unix(data: bytes) -> bytes:
    """Line ends as our search wants them; a carriage return at the very end waits for what follows."""
    if data.endswith(b"\r"):
        return data[:-1].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"\r"
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
