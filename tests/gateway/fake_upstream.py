"""A real process that answers like vLLM or SGLang, fast, and misbehaves when a message tells it to.

The last user message (or the prompt) may be a JSON object: ``{"tokens": 5, "delay_s": 0.01, "text": "...",
"status": 400, "die": "before|headers|middle", "end": "silent|half|error", "style": "sglang|spaced", "linger_s": 1}``.
``GET /seen`` returns what was asked.
"""

import asyncio
import json
import os
import socket
import sys

seen: list[dict] = []
aborted: list[str] = []
open_now: set[asyncio.Task] = set()


async def app(scope, receive, send):
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if scope["path"] == "/seen":
        await answer(send, {"seen": seen, "aborted": aborted, "open": len(open_now)})
        return
    if scope["path"] == "/forget":
        seen.clear()
        aborted.clear()
        await answer(send, {})
        return
    asked = json.loads(body)
    headers = {k.decode(): v.decode() for k, v in scope["headers"]}
    seen.append({"path": scope["path"], "body": asked, "headers": headers})
    script = told(asked)
    working = asyncio.create_task(work(scope["path"], asked, script, send))
    open_now.add(working)
    leaving = asyncio.create_task(gone(receive))
    await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    open_now.discard(working)
    if not working.done():
        aborted.append(headers.get("x-request-id", ""))
        working.cancel()
    leaving.cancel()


async def gone(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


def told(asked) -> dict:
    text = asked.get("prompt") or asked.get("input") or ""
    for message in asked.get("messages") or ():
        if message["role"] == "user":
            text = message["content"]
    try:
        script = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        return {}
    return script if isinstance(script, dict) else {}


async def work(path, asked, script, send):
    if script.get("die") == "before":
        os._exit(1)
    if "sleep_s" in script:
        await asyncio.sleep(script["sleep_s"])
    if "status" in script:
        error = {
            "message": script.get("text", f"no {asked['model']}"),
            "type": "BadRequestError",
            "param": None,
        }
        error["code"] = script["status"]
        sglang = script.get("style") == "sglang"
        return await answer(
            send, {"object": "error", **error} if sglang else {"error": error}, script["status"]
        )
    if path == "/v1/embeddings":
        return await answer(send, embeddings(asked))
    kind = Chat if path == "/v1/chat/completions" else Text
    if asked.get("stream"):
        return await stream(kind(asked, script), asked, script, send)
    return await answer(send, kind(asked, script).whole())


def embeddings(asked):
    inputs = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
    data = [
        {"object": "embedding", "index": i, "embedding": [0.1, 0.2]} for i, _ in enumerate(inputs)
    ]
    usage = {"prompt_tokens": 2 * len(inputs), "total_tokens": 2 * len(inputs)}
    return {"object": "list", "data": data, "model": asked["model"], "usage": usage}


class Chat:
    name, prefix = "chat.completion", "chatcmpl-"

    def __init__(self, asked, script):
        self.asked, self.script = asked, script
        self.n = asked.get("n") or 1
        self.count = (
            script.get("tokens")
            or asked.get("max_completion_tokens")
            or asked.get("max_tokens")
            or 6
        )
        self.words = self.parts()

    def parts(self):
        if "text" in self.script:
            text = self.script["text"]
            return [text[i : i + 4] for i in range(0, len(text), 4)]
        if (self.asked.get("response_format") or {}).get("type") == "json_schema":
            return ['{"city"', ': "Par', 'is"}']
        return [f"w{i} " for i in range(self.count)]

    def usage(self):
        done = len(self.words) * self.n
        return {"prompt_tokens": 7, "completion_tokens": done, "total_tokens": 7 + done}

    def head(self, chunk):
        name = self.name + (".chunk" if chunk and self.name == "chat.completion" else "")
        return {"id": f"{self.prefix}1", "object": name, "created": 1, "model": self.asked["model"]}

    def logprobs(self, words):
        if not self.asked.get("logprobs"):
            return None
        top = [{"token": "a", "logprob": -0.5, "bytes": [97]}]
        return {
            "content": [
                {"token": w, "logprob": -0.1, "bytes": list(w.encode()), "top_logprobs": top}
                for w in words
            ]
        }

    def calls_tool(self):
        return bool(self.asked.get("tools")) and self.asked["messages"][-1]["role"] == "user"

    def whole(self):
        message = {"role": "assistant", "content": "".join(self.words)}
        finish = "stop"
        if self.calls_tool():
            message["content"], finish = None, "tool_calls"
            message["tool_calls"] = [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"model":"x","city": "Paris"}'},
                }
            ]
        choices = [
            {
                "index": i,
                "message": message,
                "logprobs": self.logprobs(self.words),
                "finish_reason": finish,
            }
            for i in range(self.n)
        ]
        return {**self.head(False), "choices": choices, "usage": self.usage()}

    def chunks(self):
        for i in range(self.n):
            yield [
                {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            ]
        if self.calls_tool():
            for piece in (
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": ""},
                },
                {"function": {"arguments": '{"city": '}},
                {"function": {"arguments": '"Paris"}'}},
            ):
                yield [
                    {
                        "index": 0,
                        "delta": {"tool_calls": [{"index": 0, **piece}]},
                        "finish_reason": None,
                    }
                ]
            yield [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]
            return
        for word in self.words:
            for i in range(self.n):
                yield [
                    {
                        "index": i,
                        "delta": {"content": word},
                        "logprobs": self.logprobs([word]),
                        "finish_reason": None,
                    }
                ]
        for i in range(self.n):
            yield [{"index": i, "delta": {}, "finish_reason": "stop"}]


class Text(Chat):
    name, prefix = "text_completion", "cmpl-"

    def whole(self):
        asked = self.asked["prompt"]
        first = asked[0] if isinstance(asked, list) else asked
        echoed = first if self.asked.get("echo") and isinstance(first, str) else ""  # not tokens
        choices = [
            {
                "index": i,
                "text": echoed + "".join(self.words),
                "logprobs": self.text_logprobs(self.words),
                "finish_reason": "length",
            }
            for i in range(self.n)
        ]
        return {**self.head(False), "choices": choices, "usage": self.usage()}

    def text_logprobs(self, words):
        if self.asked.get("logprobs") is None:
            return None
        return {
            "tokens": words,
            "token_logprobs": [-0.1 for _ in words],
            "text_offset": [0 for _ in words],
            "top_logprobs": [{w: -0.1, "error": -3.0, "usage": -4.0} for w in words],
        }

    def chunks(self):
        for word in self.words:
            for i in range(self.n):
                yield [
                    {
                        "index": i,
                        "text": word,
                        "logprobs": self.text_logprobs([word]),
                        "finish_reason": None,
                    }
                ]


async def stream(kind, asked, script, send):
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
        }
    )
    if script.get("die") == "headers":
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await asyncio.sleep(0.05)
        os._exit(1)
    separators = (", ", ": ") if script.get("style") == "spaced" else (",", ":")
    cut = script.get("cut")
    for number, choices in enumerate(kind.chunks()):
        values = {**kind.head(True), "choices": choices}
        if script.get("style") == "sglang":
            values["usage"] = None
        await event(send, json.dumps(values, separators=separators), cut)
        if script.get("delay_s"):
            await asyncio.sleep(script["delay_s"])
        if script.get("die") == "middle" and number == 2:
            os._exit(1)
        if script.get("end") and number == 2:
            if script["end"] == "error":
                error = {
                    "object": "error",
                    "message": f"{asked['model']} is ill",
                    "type": "BadRequestError",
                    "code": 400,
                }
                await event(send, json.dumps({"error": error}), cut)
                await event(send, "[DONE]", cut)
            if script["end"] == "half":
                await send(
                    {
                        "type": "http.response.body",
                        "body": b'data: {"id": "x", "cho',
                        "more_body": True,
                    }
                )
            await send({"type": "http.response.body", "body": b""})
            return
    if (asked.get("stream_options") or {}).get("include_usage"):
        values = {**kind.head(True), "choices": [], "usage": kind.usage()}
        await event(send, json.dumps(values, separators=separators), cut)
    await event(send, "[DONE]", cut)
    await asyncio.sleep(script.get("linger_s", 0))
    await send({"type": "http.response.body", "body": b""})


async def event(send, text, cut):
    data = f"data: {text}\n\n".encode()
    for piece in [data[i : i + cut] for i in range(0, len(data), cut)] if cut else [data]:
        await send({"type": "http.response.body", "body": piece, "more_body": True})


async def answer(send, values, status=200):
    body = json.dumps(values).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    import uvicorn

    listening = socket.socket(fileno=int(sys.argv[1]))
    listening.setblocking(False)
    config = uvicorn.Config(
        app, http="httptools", lifespan="off", log_level="error", timeout_keep_alive=5
    )
    server = uvicorn.Server(config)
    print("listens", flush=True)
    server.run(sockets=[listening])
