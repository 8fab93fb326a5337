"""Answers from an OpenAI-compatible server, several requests at once, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from toolkit.errors import EngineError
from toolkit.evaluation.rows import HeldoutRow

TIMEOUT_S = 600


class Endpoint:
    """A server's ``/v1/chat/completions``.

    Args:
        url: Root of the server, with or without ``/v1``.
        model: Name that requests ask for.
    """

    def __init__(self, url: str, model: str) -> None:
        self.base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.model = model

    def answer(self, row: HeldoutRow, max_new_tokens: int) -> str:
        """The greedy answer to one row.

        Raises:
            EngineError: The server refused the request, sent something else, or is gone.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(row.prompt),
            "max_tokens": max_new_tokens,
            "temperature": 0,
        }
        if row.tools:
            body["tools"] = row.tools
            body["tool_choice"] = (
                "none"  # the template shows the tools; the answer stays text, as it was trained
            )
        reply = self._post("/chat/completions", body)
        try:
            return reply["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(
                f"{self.base} answered row {row.id} without a message: {json.dumps(reply)[:200]}"
            ) from error

    def generate(
        self, rows: Sequence[HeldoutRow], *, limits: Sequence[int], concurrent: int
    ) -> Iterator[tuple[int, str]]:
        """Yield (index of the row, answer) as answers come in; the first failure stops the rest."""
        with ThreadPoolExecutor(concurrent, thread_name_prefix="ask") as pool:
            waiting: dict[Future[str], int] = {
                pool.submit(self.answer, row, limit): index
                for index, (row, limit) in enumerate(zip(rows, limits, strict=True))
            }
            try:
                while waiting:
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield waiting.pop(future), future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(  # noqa: S310 - the URL is our own server's
            self.base + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise EngineError(
                f"{self.base}{path} answered {error.code} for model {self.model!r}: {said}",
                "the engine's log says why",
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EngineError(
                f"{self.base}{path} cannot be reached: {error}",
                "the engine may have died; its log says why",
            ) from error
