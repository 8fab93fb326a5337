"""A real process that behaves like an engine: prints, takes its time, listens, dies. For tests of the supervision."""

from pathlib import Path

from toolkit.engines import Command
from toolkit.engines.failures import COMMON, VLLM, first_match

PROGRAM = """
import http.server, json, os, signal, subprocess, sys, time
port, names, behaviour = int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
print("non-default args", flush=True)
time.sleep(0.6)
if behaviour == "fails":
    print("ValueError: To serve at least one request with the model's max seq len (8192), (0.18 GiB KV cache is needed,"
          " which is larger than the available KV cache memory (0.01 GiB).", flush=True)
    sys.exit(1)
if behaviour == "puzzles":
    print("something nobody has seen", flush=True)
    sys.exit(3)
if behaviour == "hangs":
    time.sleep(300)
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
print("child", child.pid, flush=True)
print("Starting to load model", flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"data": [{"id": name} for name in names]} if self.path == "/v1/models" else {})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = "" if behaviour == "silent" else f"{asked['model']}: {asked['messages'][-1]['content']}"
        self.answer({"choices": [{"message": {"content": text}, "finish_reason": "stop"}],
                     "usage": {"prompt_tokens": 3, "completion_tokens": 4}})

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class FakeEngine:
    name = "fake"
    phases = (("configuring", "non-default args"), ("loading weights", "Starting to load model"))

    def command(self, python: Path, deployment, port: int) -> Command:
        names = ",".join([deployment.base_name, *(a.name for a in deployment.adapters)])
        behaviour = next(iter(deployment.serve.extra_args), "serves")
        return Command((str(python), "-c", PROGRAM, str(port), names, behaviour), {"GONE": None})

    def model_id(self, deployment, adapter):
        return adapter or deployment.base_name

    def explain(self, log: str):
        return first_match(log, (*VLLM, *COMMON))
