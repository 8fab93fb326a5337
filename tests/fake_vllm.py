"""A real process that behaves like a vLLM server, for chaos: scripted delays, hangs and deaths. Standard library only.

``python fake_vllm.py PORT BASE [NAME=PATH ...] [--behaviour WORD]``; while it runs, ``POST /_fake`` changes how it
behaves: ``delay_s`` before each token, ``health_delay_s``, ``die_after`` more requests, ``hang`` every answer.
"""

import argparse
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

EXPLAINED = (
    "ValueError: To serve at least one request with the model's max seq len (8192), (0.18 GiB KV cache is needed,"
    " which is larger than the available KV cache memory (0.01 GiB)."
)
MEEK = "import time; time.sleep(300)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"


class State:
    def __init__(self, base: str, adapters: dict[str, str]) -> None:
        self.base, self.adapters = base, adapters
        self.behaviour = {"delay_s": 0.0, "health_delay_s": 0.0, "die_after": None, "hang": False}
        self.lock = threading.Lock()
        self.served: dict[str, int] = {}
        self.running = 0

    def models(self) -> list[str]:
        return [self.base, *self.adapters]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State
    silent = False
    lora = True

    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        kind = "text/plain" if isinstance(value, str) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, message, kind="BadRequestError"):
        self.answer({"error": {"message": message, "type": kind, "code": status}}, status)

    def do_GET(self):
        state = self.state
        if self.path == "/health":
            time.sleep(state.behaviour["health_delay_s"])
            self.answer({})
        elif self.path == "/v1/models":
            self.answer(
                {"object": "list", "data": [{"id": n, "object": "model"} for n in state.models()]}
            )
        elif self.path == "/metrics":
            self.answer(f"vllm:num_requests_running {state.running}\n")
        elif self.path == "/_served":
            self.answer({"pid": os.getpid(), "served": state.served, "adapters": state.adapters})
        else:
            self.answer({})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.path == "/_fake":
            self.state.behaviour.update(asked)
            self.answer(self.state.behaviour)
        elif self.path == "/tokenize":
            self.answer({"tokens": list(json.dumps(asked.get("messages")).encode())})
        elif self.path.endswith("load_lora_adapter") and self.lora:
            self.adapters(asked)
        elif self.path.startswith("/v1/") and "model" in asked:
            self.generate(asked)
        else:
            self.refuse(404, "Not Found", "NotFoundError")

    def adapters(self, asked):
        name, loaded = asked["lora_name"], self.state.adapters
        if self.path.endswith("unload_lora_adapter"):
            if loaded.pop(name, None) is None:
                self.refuse(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
            else:
                self.answer("Success")
        elif name in loaded:
            self.refuse(400, f"The lora adapter '{name}' has already been loaded.")
        elif not Path(asked["lora_path"]).is_dir():
            self.refuse(404, f"No adapter found for {asked['lora_path']}", "NotFoundError")
        else:
            loaded[name] = asked["lora_path"]
            self.answer("Success")

    def generate(self, asked):
        state = self.state
        if asked["model"] not in state.models():
            self.refuse(404, f"The model `{asked['model']}` does not exist.", "NotFoundError")
            return
        with state.lock:
            state.running += 1
            state.served[asked["model"]] = state.served.get(asked["model"], 0) + 1
            left = state.behaviour["die_after"]
            if left is not None:
                state.behaviour["die_after"] = left - 1
        if left is not None and left <= 0:
            os._exit(7)
        while state.behaviour["hang"]:
            time.sleep(0.1)
        try:
            self.stream(asked) if asked.get("stream") else self.whole(asked)
        finally:
            with state.lock:
                state.running -= 1

    def words(self, asked):
        content = asked["messages"][-1]["content"] if "messages" in asked else asked["prompt"]
        text = "" if self.silent else f"{asked['model']}: {content}"
        count = asked.get("max_tokens") or 4
        return [text, *(f" t{n}" for n in range(1, count))] if "max_tokens" in asked else [text]

    def score(self, asked):
        """Logprobs of a model that knows nothing, but is another for every name: an adapter has an effect."""
        token, count = asked["allowed_token_ids"][0], asked["max_tokens"]
        said = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        for n in range(count):
            logprob = -1.0 - (hash_of(asked["model"], asked["prompt"], n) % 1000) / 500
            said["tokens"].append(f"token_id:{token}")
            said["token_logprobs"].append(logprob)
            said["top_logprobs"].append({f"token_id:{token}": logprob})
        self.answer({"choices": [{"text": "", "logprobs": said, "finish_reason": "length"}]})

    def whole(self, asked):
        if "allowed_token_ids" in asked:
            self.score(asked)
            return
        words = self.words(asked)
        time.sleep(self.state.behaviour["delay_s"] * len(words))
        message = {"role": "assistant", "content": words[0]}
        choice = {"index": 0, "message": message, "text": words[0], "finish_reason": "stop"}
        self.answer(
            {
                "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": asked["model"],
                "choices": [choice],
                "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
            }
        )  # fmt: skip

    def stream(self, asked):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        words = self.words(asked)
        for number, word in enumerate(words):
            time.sleep(self.state.behaviour["delay_s"])
            last = number == len(words) - 1
            choice = {
                "index": 0,
                "delta": {"content": word},
                "finish_reason": "stop" if last else None,
            }
            event = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1}
            self.event(json.dumps(event | {"model": asked["model"], "choices": [choice]}))
        if (asked.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 3, "completion_tokens": len(words), "total_tokens": 7}
            self.event(json.dumps(event | {"model": asked["model"], "choices": [], "usage": usage}))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data):
        raw = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
        self.wfile.flush()


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("base")
    parser.add_argument("adapters", nargs="*")
    parser.add_argument("--behaviour", default="serves")
    parser.add_argument("--no-lora", action="store_true")
    parser.add_argument("--start-s", type=float, default=0.6)
    parser.add_argument("--dies-after-s", type=float)
    given = parser.parse_args()
    print("non-default args", flush=True)
    time.sleep(given.start_s)
    if given.behaviour == "fails":
        print(EXPLAINED, flush=True)
        sys.exit(1)
    if given.behaviour == "puzzles":
        print("something nobody has seen", flush=True)
        sys.exit(3)
    if given.behaviour == "hangs":
        time.sleep(300)
    # Waiting for the kill takes seconds: tests of something else ask for a child that goes when it is told.
    meek = "FAKE_VLLM_HAS_A_MEEK_CHILD" in os.environ
    child = subprocess.Popen([sys.executable, "-S", "-c", MEEK if meek else STUBBORN])
    print("child", child.pid, flush=True)
    print("gpus", os.environ.get("CUDA_VISIBLE_DEVICES", "all"), flush=True)
    print("Starting to load model", flush=True)
    Handler.state = State(given.base, dict(entry.split("=", 1) for entry in given.adapters))
    Handler.silent = given.behaviour == "silent"
    Handler.lora = not given.no_lora
    if given.dies_after_s is not None:
        threading.Timer(given.dies_after_s, die).start()
    Server(("127.0.0.1", given.port), Handler).serve_forever()


def hash_of(*parts):
    return zlib.crc32(repr(parts).encode())


def die():
    print("last words", flush=True)
    os._exit(7)


if __name__ == "__main__":
    main()
