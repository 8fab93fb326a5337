"""The part of the OpenAI API that the toolkit speaks, on the standard library: it works in every environment."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from toolkit.engines import Call
from toolkit.errors import EngineError, UsageError

Message = Mapping[str, Any]


class RefusedError(EngineError):
    """The endpoint answered, but not with 200.

    Attributes:
        status: HTTP status.
        reason: What the endpoint said.
    """

    def __init__(self, url: str, status: int, reason: str) -> None:
        super().__init__(f"{url} answered {status}: {reason}")
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Reply:
    """An answer and what it cost."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(frozen=True)
class Delta:
    """One event of a stream; ``usage`` comes with the last."""

    text: str
    usage: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Client:
    """An OpenAI endpoint.

    Args:
        url: ``http://host:port``, with or without ``/v1``.
        api_key: Sent as a bearer token.
        timeout_s: Longest silence of the server.
    """

    url: str
    api_key: str | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                f"{self.url!r} is not the URL of an endpoint", "write it as http://127.0.0.1:8000"
            )

    @property
    def root(self) -> str:
        """The URL without ``/v1``."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def _opener(self) -> urllib.request.OpenerDirector:
        """Loopback is reached directly, whatever proxy the environment names."""
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))

    def healthy(self) -> bool:
        """Whether ``/health`` answers 200 within two seconds."""
        try:
            with self._opener.open(f"{self.root}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def models(self) -> list[str]:
        """Names that the endpoint serves.

        Raises:
            EngineError: It does not answer.
        """
        answer = self.get("/v1/models")
        try:
            return [str(entry["id"]) for entry in answer["data"]]
        except (KeyError, TypeError):
            raise EngineError(f"{self.root}/v1/models lists no models: {answer!r:.200}") from None

    def chat(self, model: str, messages: Sequence[Message], **options: Any) -> Reply:
        """One answer; ``options`` (``temperature``, ``max_tokens``, ``tools``) go into the request as they are.

        Raises:
            EngineError: The endpoint refuses or breaks off.
        """
        start = time.monotonic()
        body = {"model": model, "messages": list(messages), **options}
        answer = json.loads(self._send("/v1/chat/completions", body))
        choice, usage = answer["choices"][0], answer["usage"]
        return Reply(
            text=choice["message"].get("content") or "",
            finish_reason=choice["finish_reason"],
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            seconds=time.monotonic() - start,
        )

    def complete(self, model: str, prompt: str, **options: Any) -> str:
        """A raw continuation, without a template.

        Raises:
            EngineError: The endpoint refuses, or does not answer in time.
        """
        answer = json.loads(
            self._send("/v1/completions", {"model": model, "prompt": prompt, **options})
        )
        return str(answer["choices"][0]["text"])

    def stream(self, model: str, messages: Sequence[Message], **options: Any) -> Iterator[Delta]:
        """The answer as it comes.

        Raises:
            EngineError: The endpoint refuses, breaks off, or ends without ``[DONE]``.
        """
        body = {"model": model, "messages": list(messages), **options, "stream": True}
        body["stream_options"] = {"include_usage": True}
        try:
            with self._open("/v1/chat/completions", body) as answer:
                yield from read_events(answer)
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"{self.root} broke off in the middle of an answer: {error!r}"
            ) from None

    def call(self, call: Call) -> bytes:
        """Send a request of an engine's own, and return what it answers.

        Raises:
            EngineError: It refuses or does not answer.
        """
        return self._send(call.path, call.body if call.method == "POST" else None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that any route answers.

        Raises:
            RefusedError: It answers with another status than 200.
            EngineError: It does not answer, or not with JSON.
        """
        return self._read(path, self._send(path, body))

    def get(self, path: str) -> Any:
        """The JSON behind a route; the same errors as :meth:`post`."""
        return self._read(path, self._send(path))

    def _read(self, path: str, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except ValueError:
            raise EngineError(
                f"{self.root}{path} answered what is not JSON: {answer[:80]!r}"
            ) from None

    def _send(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        try:
            with self._open(path, body) as answer:
                content: bytes = answer.read()
                return content
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"{self.root} broke off in the middle of an answer: {error!r}"
            ) from None

    def _open(self, path: str, body: Mapping[str, Any] | None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.root}{path}", data, headers)  # noqa: S310 - scheme checked above
        try:
            answer: http.client.HTTPResponse = self._opener.open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            raise RefusedError(f"{self.root}{path}", error.code, _reason(error)) from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"{self.root} does not answer: {getattr(error, 'reason', error)}",
                "is it running? `toolkit serve --status`",
            ) from None
        return answer


def read_events(lines: Any) -> Iterator[Delta]:
    """Read server-sent events up to ``[DONE]``.

    Raises:
        EngineError: An event is an error, or the stream ends early.
    """
    for raw in lines:
        line = raw.strip()
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise EngineError(f"the engine broke off: {event['error']}")
        choices = event.get("choices") or [{}]
        yield Delta((choices[0].get("delta") or {}).get("content") or "", event.get("usage"))
    raise EngineError(
        "the stream ended without [DONE]: the engine was stopped or died", "look into its log"
    )


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read(4000).decode(errors="replace")
    try:
        problem = json.loads(text)
    except ValueError:
        return text.strip() or str(error.reason)
    inner = problem.get("error", problem) if isinstance(problem, dict) else problem
    return str(inner.get("message", inner)) if isinstance(inner, dict) else str(inner)
