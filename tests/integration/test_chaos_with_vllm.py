"""One pass of chaos with the real vLLM on a CPU: proven, killed, healed, stopped, gone.

The interpreter is the vLLM environment's, or ``TOOLKIT_TEST_VLLM`` where that is set.
"""

import signal
import sys
import time
from dataclasses import replace

import pytest

from tests.integration.test_chaos import engine_of, port_is_free, restarted
from tests.integration.test_real_vllm_is_supervised import adapter, interpreter, tiny_llama
from tests.serving import Supervised, ask, get, gone, kill, spec, wait_for
from toolkit.engines import guard
from toolkit.serving.desired import read_spec
from toolkit.serving.state import InterpreterSpec

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="the guard needs Linux"),
]
START_S = 600.0
"""On a busy machine with two cores."""
SUPERVISOR = (sys.executable, "-m", "toolkit.serving")


def answer(url: str, model: str) -> str:
    status, said = ask(url, model, 120, max_tokens=8, temperature=0, ignore_eos=True)
    assert status == 200, said
    return said["choices"][0]["message"]["content"]


def test_a_real_engine_is_proven_killed_healed_and_leaves_nothing(
    tmp_path, monkeypatch, warm_cache
):
    python = interpreter()  # of the user's cache, before the test gets one of its own
    monkeypatch.setenv("TOOLKIT_CACHE", str(warm_cache(tmp_path / "cache")))
    made = spec(
        tmp_path, adapters=[read_spec("tiny", adapter(tmp_path / "adapter"))], name="tiny",
        max_concurrent=4, kv_cache_gib=0.25, dtype="fp32", drain_s=30,
    )  # fmt: skip
    made = replace(
        made,
        model=str(tiny_llama(tmp_path / "tiny-llama")),
        engine=InterpreterSpec(str(python)),
        max_length=128,
        tuning={},
    )
    server = Supervised(made, SUPERVISOR)
    try:
        server.event("ready", START_S)
        url = server.url
        before = {model: answer(url, model) for model in ("tiny-base", "tiny")}
        assert before["tiny"] != before["tiny-base"]
        assert "adapters" in str(get(f"{url}/toolkit/certificate")[1])

        kill(engine_of(server.part("replica-0")["pid"]))
        wait_for(lambda: restarted(server, "replica-0"), 10)
        assert get(f"{url}/readyz")[0] == 503
        wait_for(lambda: get(f"{url}/readyz")[0] == 200, START_S)
        assert {model: answer(url, model) for model in before} == before

        family = guard.descendants(server.process.pid)
        began = time.monotonic()
        server.signal(signal.SIGKILL)
        kill(server.part_pids["replica-0"])
        wait_for(lambda: gone(family), 10)
        assert port_is_free(url)
        print(f"gone in {time.monotonic() - began:.1f} s")
    finally:
        server.close()
