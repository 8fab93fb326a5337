"""A live engine as the proofs see it: ids of a chat, logprobs of ids, one request or many at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from toolkit.engines.client import Client, RefusedError
from toolkit.errors import EngineError
from toolkit.proof import ProofTarget
from toolkit.proof.engine_calls import CALLS, Calls, Request, Scored
from toolkit.proof.reference import StoredConversation

TOGETHER = 16
"""Requests that are sent at once where a batch is wanted."""


@dataclass(frozen=True)
class Live:
    """Talks to one engine over loopback.

    Args:
        target: The engine.
        calls: Its shapes of requests.
    """

    target: ProofTarget
    calls: Calls

    @classmethod
    def of(cls, target: ProofTarget) -> Live:
        """Talk to ``target``."""
        return cls(target, CALLS[target.engine]())

    @property
    def client(self) -> Client:
        """Plain HTTP."""
        return Client(self.target.url, timeout_s=self.target.timeout_s)

    def ids(self, model_id: str, conversation: StoredConversation) -> list[int]:
        """Ids that a chat request with this conversation would have.

        Raises:
            RefusedError: The engine refuses the conversation.
            EngineError: It does not answer.
        """
        asked = self.calls.tokenize(
            model_id, conversation.messages, conversation.tools, conversation.kwargs
        )
        return [int(i) for i in self.client.post(asked.path, asked.body)["tokens"]]

    def question_ids(self, text: str) -> list[int]:
        """Ids of a chat in which a user says ``text``; of the text alone where the model has no chat template.

        Raises:
            EngineError: The engine refuses, or does not answer.
        """
        model_id = self.target.model_id
        try:
            return self.ids(model_id, StoredConversation("", ({"role": "user", "content": text},)))
        except RefusedError:
            answer = self._post(Request("/tokenize", {"model": model_id, "prompt": text}))
            return [int(i) for i in answer["tokens"]]

    def score(self, model_id: str, ids: Sequence[int], places: Sequence[int]) -> Scored:
        """Logprobs of ``ids`` at ``places`` under a model or an adapter.

        Raises:
            EngineError: The engine refuses, does not answer, or answers in another shape.
        """
        asked = self.calls.score(model_id, self.target.model_id, ids, places)
        return self._read([self._post(request) for request in asked], ids, places)

    def score_together(
        self, rows: Sequence[tuple[str, Sequence[int], Sequence[int]]]
    ) -> list[Scored]:
        """Many (model id, ids, places) at once, so that the engine batches them; answers in order."""
        asked = [self.calls.score(m, self.target.model_id, ids, places) for m, ids, places in rows]
        with ThreadPoolExecutor(TOGETHER, thread_name_prefix="proof") as pool:
            answers = pool.map(self._post, [request for requests in asked for request in requests])
            per_row = [[next(answers) for _ in requests] for requests in asked]
        return [
            self._read(given, ids, places)
            for given, (_, ids, places) in zip(per_row, rows, strict=True)
        ]

    def _post(self, request: Request) -> Any:
        try:
            return self.client.post(request.path, request.body)
        except RefusedError as error:
            raise EngineError(error.message, "the engine's log says why") from error

    def _read(self, answers: Sequence[Any], ids: Sequence[int], places: Sequence[int]) -> Scored:
        try:
            return self.calls.scored(answers, ids, places)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"{self.target.engine} gives logprobs otherwise than the versions that were tried: {error!r}",
                "see toolkit/proof/engine_calls.py",
            ) from error

    def complete(self, model_id: str, ids: Sequence[int], tokens: int) -> None:
        """Let a model write ``tokens`` tokens; the answer is thrown away.

        Raises:
            EngineError: The engine refuses or does not answer.
        """
        body = {"model": model_id, "prompt": list(ids), "max_tokens": tokens, "temperature": 0}
        self.client.post("/v1/completions", body)

    def text(self, token: int) -> str:
        """A token as text, for messages; its number where the engine will not say."""
        asked = self.calls.detokenize(self.target.model_id, token)
        try:
            answer = self.client.post(asked.path, asked.body)
        except RefusedError:
            return f"#{token}"
        return str(answer.get("prompt", answer.get("text", f"#{token}")))

    def version(self) -> str | None:
        """The engine's version, where it says one."""
        for path in ("/version", "/server_info", "/get_server_info"):
            try:
                answer = self.client.get(path)
            except EngineError:
                continue
            if isinstance(answer, dict) and answer.get("version"):
                return str(answer["version"])
        return None
