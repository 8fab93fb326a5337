"""An engine in a thread, with a model of a few numbers: logprobs that can be made right, noisy or wrong on purpose."""

import contextlib
import http.server
import json
import math
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

VOCABULARY = 64
Logprobs = Callable[[Sequence[int]], list[float]]
"""Prefix -> logprobs of the next token."""


def model(change: float = 0.0, seed: int = 0, noise: float = 0.0) -> Logprobs:
    """A base (change 0), or the base with an adapter on it whose change is scaled."""

    def logprobs(prefix: Sequence[int]) -> list[float]:
        base = random.Random(f"base {tuple(prefix[-3:])}")
        adapter = random.Random(f"adapter {seed} {tuple(prefix[-3:])}")
        logits = [2 * base.gauss(0, 1) + change * adapter.gauss(0, 1) for _ in range(VOCABULARY)]
        logits = [logit + noise * random.gauss(0, 1) for logit in logits]
        total = math.log(sum(map(math.exp, logits)))
        return [logit - total for logit in logits]

    return logprobs


def render(messages: Sequence[Mapping], tools: Sequence = (), space: str = "") -> list[int]:
    """What the template makes of a chat: bytes modulo the vocabulary. ``space`` is a template changed by one space."""
    text = "".join(f"<{m['role']}>{m.get('content') or ''}" for m in messages)
    text += json.dumps(list(tools)) if tools else ""
    return [byte % VOCABULARY for byte in f"{text}<assistant>{space}".encode()]


@dataclass
class TinyEngine:
    """Speaks vLLM's routes; ``models`` by model id."""

    models: dict[str, Logprobs]
    space: str = ""
    refuses: str | None = None
    """Text in a chat that the template refuses."""
    has_template: bool = True
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        self.asked.append(path)
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if path == "/tokenize":
            return self._tokenize(body)
        if path == "/detokenize":
            return 200, {"prompt": f"t{body['tokens'][0]}"}
        return 200, self._complete(body)

    def _tokenize(self, body: dict) -> tuple[int, dict]:
        if "messages" in body and not self.has_template:
            return 400, {"error": {"message": "you must provide a chat template"}}
        if self.refuses and self.refuses in json.dumps(body["messages"]):
            return 400, {"error": {"message": "System role not supported"}}
        messages = body.get("messages") or [{"role": "text", "content": body["prompt"]}]
        tokens = render(messages, body.get("tools", ()), self.space)
        return 200, {"tokens": tokens, "count": len(tokens)}

    def _complete(self, body: dict) -> dict:
        said: dict = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        prefix = list(body["prompt"])
        for _ in range(body["max_tokens"]):
            logprobs = self.models[body["model"]](prefix)
            best = sorted(range(VOCABULARY), key=lambda i: -logprobs[i])
            token = body.get("allowed_token_ids", best)[0]
            said["tokens"].append(f"token_id:{token}")
            said["token_logprobs"].append(logprobs[token])
            said["top_logprobs"].append({f"token_id:{i}": logprobs[i] for i in {token, *best[:8]}})
            prefix.append(token)
        return {"choices": [{"text": "", "logprobs": said}]}

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Its URL."""
        engine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def send(self, status: int, value: dict) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                known = self.path == "/version"
                self.send(200 if known else 404, {"version": "0.32.0"} if known else {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send(*engine.answer(self.path, body))

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
