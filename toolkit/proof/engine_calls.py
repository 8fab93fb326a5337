"""What the proofs ask of an engine: pure shapes of requests and answers, by engine.

Read from vLLM 0.26 and 0.32 (``entrypoints/serve/tokenize``, ``entrypoints/openai/completion``) and SGLang 0.5.17
(``entrypoints/openai/serving_tokenize.py``, ``managers/io_struct.py``), and tried against both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from toolkit.errors import EngineError
from toolkit.registry import Registry

Message = Mapping[str, Any]

TOP = 8
"""Most likely tokens asked for at each position; vLLM gives 20 at most unless told otherwise."""


@dataclass(frozen=True)
class Request:
    """A POST request: path and JSON body."""

    path: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Scored:
    """What a model says of given ids at some places.

    Attributes:
        logprobs: Natural log of the probability of the id at each place, after those before it.
        top: The most likely ids there and their logprobs.
    """

    logprobs: tuple[float, ...]
    top: tuple[Mapping[int, float], ...]


class Calls(Protocol):
    """The requests of one engine."""

    def tokenize(
        self,
        model_id: str,
        messages: Sequence[Message],
        tools: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Request:
        """Ask for the ids that a chat request with these messages would have."""
        ...

    def score(
        self, model_id: str, base_id: str, ids: Sequence[int], places: Sequence[int]
    ) -> list[Request]:
        """Ask for the logprobs of ``ids`` at ``places`` (each from 1 up) under a model; may take several requests.

        ``base_id`` is the base's own model id.
        """
        ...

    def scored(
        self, answers: Sequence[Mapping[str, Any]], ids: Sequence[int], places: Sequence[int]
    ) -> Scored:
        """Read the answers to :meth:`score`."""
        ...

    def detokenize(self, model_id: str, token: int) -> Request:
        """Ask for the text of one token."""
        ...


class VllmCalls:
    """vLLM: ``/tokenize``, and ``/v1/completions`` that may write one token only.

    Not with ``prompt_logprobs``: beside adapters it leaves out what they change in the output head (vLLM issue 51594),
    and on a CPU 0.32 dies of it when two requests are batched.
    """

    def tokenize(
        self,
        model_id: str,
        messages: Sequence[Message],
        tools: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Request:
        """The chat form of ``/tokenize``."""
        body: dict[str, Any] = {
            "model": model_id,
            "messages": as_sent(messages),
            "add_generation_prompt": True,
        }
        return Request("/tokenize", body | _more(tools, kwargs))

    def score(
        self,
        model_id: str,
        base_id: str,  # noqa: ARG002 - SGLang needs it
        ids: Sequence[int],
        places: Sequence[int],
    ) -> list[Request]:
        """One request for each run of equal ids; logprobs are those before anything was forbidden."""
        return [
            Request(
                "/v1/completions",
                {
                    "model": model_id,
                    "prompt": list(ids[: run.start]),
                    "max_tokens": len(run),
                    "temperature": 0,
                    "ignore_eos": True,
                    "allowed_token_ids": [ids[run.start]],
                    "logprobs": TOP,
                    "return_tokens_as_token_ids": True,
                },
            )
            for run in runs(ids, places)
        ]

    def scored(
        self, answers: Sequence[Mapping[str, Any]], ids: Sequence[int], places: Sequence[int]
    ) -> Scored:
        """``choices[0].logprobs``: ids come as ``token_id:123``."""
        own: list[float] = []
        top: list[Mapping[int, float]] = []
        for answer, run in zip(answers, runs(ids, places), strict=True):
            said = answer["choices"][0]["logprobs"]
            _require_same(said["tokens"], [f"token_id:{ids[place]}" for place in run])
            own += [float(lp) for lp in said["token_logprobs"]]
            top += [_best(entry) for entry in said["top_logprobs"]]
        return Scored(tuple(own), tuple(top))

    def detokenize(self, model_id: str, token: int) -> Request:
        """One id."""
        return Request("/detokenize", {"model": model_id, "tokens": [token]})


class SglangCalls:
    """SGLang: ``/tokenize``, and its own ``/generate``, which knows adapters by name."""

    def tokenize(
        self,
        model_id: str,
        messages: Sequence[Message],
        tools: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Request:
        """SGLang asks for the answer always: there is no ``add_generation_prompt``."""
        body: dict[str, Any] = {"model": model_id, "messages": as_sent(messages)}
        return Request("/tokenize", body | _more(tools, kwargs))

    def score(
        self, model_id: str, base_id: str, ids: Sequence[int], places: Sequence[int]
    ) -> list[Request]:
        """All places at once; logprobs from ``logprob_start_len`` on also keep the prefix cache out of it."""
        adapter = model_id.removeprefix(f"{base_id}:") if model_id != base_id else None
        body: dict[str, Any] = {
            "input_ids": list(ids[: places[-1] + 1]),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": TOP,
        }
        return [Request("/generate", body | ({"lora_path": adapter} if adapter else {}))]

    def scored(
        self, answers: Sequence[Mapping[str, Any]], ids: Sequence[int], places: Sequence[int]
    ) -> Scored:
        """``[logprob, id, text]`` by position; the first logprob is null."""
        meta = answers[0]["meta_info"]
        own, top = meta["input_token_logprobs"], meta["input_top_logprobs"]
        _require_same([int(own[place][1]) for place in places], [ids[p] for p in places])
        best = tuple({int(i): float(lp) for lp, i, *_ in top[place] or ()} for place in places)
        return Scored(tuple(float(own[place][0]) for place in places), best)

    def detokenize(self, model_id: str, token: int) -> Request:
        """One id, special or not."""
        body = {"model": model_id, "tokens": [token], "skip_special_tokens": False}
        return Request("/detokenize", body)


CALLS = Registry(
    "engine",
    {
        "vllm": "toolkit.proof.engine_calls:VllmCalls",
        "sglang": "toolkit.proof.engine_calls:SglangCalls",
    },
)
"""Calls by the name of the engine."""


def as_sent(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a client sends them: arguments of tool calls are JSON in a string, every call has an id."""
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    return {**message, "tool_calls": [_call(n, call) for n, call in enumerate(calls)]}


def _call(number: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {
        "id": f"call_{number}",
        **call,
        "type": "function",
        "function": {**function, "arguments": arguments},
    }


def _more(tools: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"tools": list(tools)} if tools else {}
    return found | ({"chat_template_kwargs": dict(kwargs)} if kwargs else {})


def runs(ids: Sequence[int], places: Sequence[int]) -> list[range]:
    """``places`` in stretches that follow each other and hold the same id."""
    found: list[range] = []
    for place in places:
        last = found[-1] if found else None
        if last is not None and last.stop == place and ids[place] == ids[last.start]:
            found[-1] = range(last.start, place + 1)
        else:
            found.append(range(place, place + 1))
    return found


def _best(place: Mapping[str, float]) -> dict[int, float]:
    """The top entries by id: vLLM adds the token itself where it is not among them."""
    best = sorted(place.items(), key=lambda entry: -entry[1])[:TOP]
    return {int(token.removeprefix("token_id:")): float(lp) for token, lp in best}


def _require_same(said: Sequence[int | str], asked: Sequence[int | str]) -> None:
    if list(said) != list(asked):
        raise EngineError(
            f"the engine scored {list(said)}, but was asked for {list(asked)}",
            "this version answers otherwise than those that were tried; see toolkit/proof/engine_calls.py",
        )
