"""The serving benchmark, as far as it goes without a GPU: its load, its tables, its kernel settings."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "serving"
RAW = ROOT / "docs" / "measurements"


@pytest.fixture(scope="module")
def tools():
    """The benchmark's scripts are no package: they run beside each other."""
    sys.path.insert(0, str(FOLDER))
    import report
    import tune_lora

    yield {"report": report, "tune_lora": tune_lora}
    sys.path.remove(str(FOLDER))
    for name in ("report", "tune_lora"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def upstream():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, FOLDER / "fake.py", str(port), "vllm", "base", "a0"]
    )
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(10)


def load(url: str, *arguments: str) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, FOLDER / "load.py", "--url", url, "--prompt-tokens", "8", "--max-tokens", "5", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


def test_load_counts_what_the_engine_says(upstream, tmp_path):
    code, said = load(
        upstream, "--model", "base", "--model", "a0", "--clients", "4", "--rounds", "3",
        "--samples", str(tmp_path / "samples.jsonl"),
    )  # fmt: skip
    assert code == 0
    assert (said["requests"], said["failed"], said["short_answers"]) == (12, 0, 0)
    assert said["completion_tokens"] == 12 * 5
    assert said["prompt_tokens"] == 12 * 8
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert sorted({s["model"] for s in samples}) == ["a0", "base"]
    assert all(0 < s["ttft"] <= s["e2e"] for s in samples)


def test_load_fails_when_a_request_does(upstream):
    code, said = load(upstream, "--model", "nobody", "--clients", "2", "--rounds", "1")
    assert code == 1
    assert said["failed"] == 2
    assert "The model `nobody` does not exist" in said["errors"][0]


@pytest.mark.parametrize("raw", sorted(RAW.glob("serving-*.json")), ids=lambda p: p.stem)
def test_the_tables_in_the_docs_are_those_of_the_raw_numbers(tools, raw):
    page = (ROOT / "docs/explanation/measurements.md").read_text()
    rows = [
        line for line in tools["report"].report(tools["report"].read([raw])).splitlines()
        if line.startswith("| ")
    ]  # fmt: skip
    assert rows
    assert [row for row in rows if row not in page] == []


def test_ratios_are_of_the_right_things(tools):
    def level(tokens: int) -> dict:
        return {
            "completion_tokens": tokens,
            "seconds": 1.0,
            "ttft_ms": {"p50": 1, "p99": 2},
            "tpot_ms": {"p50": 3, "p99": 4},
        }

    found = {
        "vllm-bf16/base-64/0": level(100), "vllm-bf16/base-64/1": level(100), "vllm-bf16/one-64/0": level(90),
        "vllm-bare/base-64/0": level(110),
        "hf/generate": {"tokens_per_s": 10.0, "batch": 64, "one_by_one": {"tokens_per_s": 2.0}},
    }  # fmt: skip
    table = tools["report"].throughput(found, 64)
    assert (
        "| vLLM bf16, toolkit | 1 adapter | 90 | 1.0 / 2.0 | 3.0 / 4.0 | 90.0 % | 81.8 % | 9.0 x |"
        in table
    )
    goals = tools["report"].goals(found)
    assert "| vllm: cost of 1 adapter, bf16, 64 clients | 10.0 % | <= 12 % | yes |" in goals
    assert "| vllm: base to HF generate, 64 clients in one batch | 10.0 x | >= 8 x | yes |" in goals
    assert "| vllm: base to HF generate, 64 clients one after the other | 50.0 x |" in goals


def test_shrink_candidates_fill_every_block(tools):
    tune = tools["tune_lora"]
    for kind, module, tokens in tune.cases():
        for settings in tune.CANDIDATES[kind](module, tokens)[1:]:
            if kind == "shrink":
                assert module.width % (settings["block_k"] * settings["split_k"]) == 0
            else:
                assert settings["block_k"] == tune.RANK


def test_kernel_files_hold_every_number_of_slices_that_vllm_may_ask_for(tools):
    tune = tools["tune_lora"]
    rows = [
        {"kind": kind, "module": module.name, "tokens": tokens, "config": {"block_m": 16}}
        for kind, module, tokens in tune.cases()
    ]
    for table in tune.files(rows).values():
        for slices in table.values():
            assert set(slices) >= {str(n) for n in range(1, 9)}


def test_shipped_kernel_files_are_what_vllm_reads():
    found = sorted((FOLDER / "lora-kernels").glob("NVIDIA_*.json"))
    assert {f.stem.removeprefix("NVIDIA_H200_") for f in found} == {
        "SHRINK",
        "EXPAND_TRUE",
        "EXPAND_FALSE",
    }
    for file in found:
        leaf = json.loads(file.read_text())
        for _ in range(5):  # slots, slices, tokens, K, N
            leaf = next(iter(leaf.values()))
        assert {
            "block_m",
            "block_n",
            "block_k",
            "split_k",
            "num_warps",
            "num_stages",
            "num_ctas",
        } <= set(leaf)
