"""A real vLLM on a CPU serves a tiny random Llama with an adapter, and takes another while it runs.

``kill -9`` of the toolkit leaves nothing of it.

The interpreter is the vLLM environment's, or ``TOOLKIT_TEST_VLLM`` where that is set.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from toolkit import environments
from toolkit.engines import guard

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="the guard needs Linux"),
]

HIDDEN, MIDDLE, HEADS, LAYERS, RANK = 128, 256, 2, 2, 4
SPECIAL = ["<s>", "</s>"]
ALPHABET = [chr(c) for c in range(33, 127)] + ["\u0120", "\u010a"]
"""Byte-level names of printable ASCII, the space and the line feed: enough for the questions here."""

TOOLKIT = """
import json, sys, time
from pathlib import Path
from urllib.request import Request, urlopen
from toolkit.engines import versioned
from toolkit.engines.server import running
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Interpreter
python, model, adapter, log = map(Path, sys.argv[1:])
section = ServeSection(port=0, max_concurrent=4, kv_cache_gib=0.25, dtype="fp32")
with running("vllm", Interpreter(python), model, {"tiny": adapter}, section, name="tiny", max_length=128,
             device="cpu", log=log) as server:
    ask = [{"role": "user", "content": "Who are you?"}]
    for model_id in server.models.values():
        reply = server.client.chat(model_id, ask, max_tokens=16, temperature=0, ignore_eos=True)
        print(reply.text.encode(), flush=True)
    def send(call):
        body = json.dumps(call.body).encode()
        header = {"Content-Type": "application/json"}
        with urlopen(Request(server.url + call.path, body, header, method=call.method)) as answer:
            return answer.status
    name = versioned("tiny", "1a2b3c4d5e6f7081" * 4)
    loaded = send(server.engine.load_adapter(name, adapter))
    reply = server.client.chat(name, ask, max_tokens=16, temperature=0, ignore_eos=True)
    print(reply.text.encode(), flush=True)
    print(loaded, send(server.engine.unload_adapter(name)), *server.client.models(), flush=True)
    print(server.pid, *server.phases, flush=True)
    time.sleep(600)
"""


def safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def tiny_llama(folder: Path) -> Path:
    folder.mkdir()
    source = np.random.default_rng(0)
    vocabulary = len(SPECIAL) + len(ALPHABET)

    def random(*shape: int) -> np.ndarray:
        return source.normal(0, 0.2, shape).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": random(vocabulary, HIDDEN),
        "lm_head.weight": random(vocabulary, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for n in range(LAYERS):
        for name in ("q", "k", "v", "o"):
            tensors[f"model.layers.{n}.self_attn.{name}_proj.weight"] = random(HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            tensors[f"model.layers.{n}.mlp.{name}_proj.weight"] = random(MIDDLE, HIDDEN)
        tensors[f"model.layers.{n}.mlp.down_proj.weight"] = random(HIDDEN, MIDDLE)
        for name in ("input", "post_attention"):
            tensors[f"model.layers.{n}.{name}_layernorm.weight"] = np.ones(HIDDEN, np.float32)
    safetensors(folder / "model.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "dtype": "float32",
        "intermediate_size": MIDDLE, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "num_hidden_layers": LAYERS, "max_position_embeddings": 256, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    vocab = {token: index for index, token in enumerate(SPECIAL + ALPHABET)}
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": level,
        "post_processor": None, "decoder": level,
        "added_tokens": [
            {"id": i, "content": t, "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for i, t in enumerate(SPECIAL)
        ],
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": None},
    }  # fmt: skip
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    return folder


def adapter(folder: Path) -> Path:
    folder.mkdir()
    source = np.random.default_rng(1)
    tensors = {}
    for n in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.{n}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = source.normal(0, 0.5, (RANK, HIDDEN)).astype(
                np.float32
            )
            tensors[f"{prefix}.lora_B.weight"] = source.normal(0, 0.5, (HIDDEN, RANK)).astype(
                np.float32
            )
    safetensors(folder / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "tiny", "init_lora_weights": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def interpreter() -> Path:
    given = os.environ.get("TOOLKIT_TEST_VLLM")
    return (
        Path(given)
        if given
        else environments.resolve("vllm", accelerator="cpu").interpreter().python
    )


def session(leader: int) -> list[int]:
    """Living processes of the guard's session: vLLM starts none outside it."""
    found = []
    for pid in guard.processes():
        try:
            fields = guard.stat_fields(pid)
        except OSError:
            continue
        if fields[3] == str(leader) and fields[0] not in "ZX":
            found.append(pid)
    return found


def test_vllm_serves_base_and_adapter_and_dies_with_the_toolkit(tmp_path, monkeypatch):
    python = interpreter()  # of the user's cache, before the test gets one of its own
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    model, lora, log = (
        tiny_llama(tmp_path / "model"),
        adapter(tmp_path / "adapter"),
        tmp_path / "engine.log",
    )
    toolkit = subprocess.Popen(
        [sys.executable, "-c", TOOLKIT, str(python), str(model), str(lora), str(log)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    try:
        base, tuned, live, calls, state = (toolkit.stdout.readline().strip() for _ in range(5))
        assert state, log.read_text()[-3000:]
        guard_pid, *phases = state.split(" ", 1)[0], *state.split()[1:]
        assert len(base) > 4
        assert len(tuned) > 4
        assert base != tuned, "the adapter has no effect"
        assert live == tuned, "the same adapter, loaded while the engine runs, answers otherwise"
        assert calls == "200 200 tiny-base tiny"
        compiled = list((tmp_path / "cache" / "compiled").iterdir())
        assert any((folder / "vllm").is_dir() for folder in compiled), (
            "vLLM keeps its cache elsewhere"
        )
        assert phases[0] == "importing"
        assert len(session(int(guard_pid))) >= 3, "guard, API process, EngineCore"
    finally:
        toolkit.kill()
        toolkit.wait()
        toolkit.stdout.close()
    deadline = time.monotonic() + 30
    while left := session(int(guard_pid)):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert list((tmp_path / "cache" / "guards").iterdir()) == []
