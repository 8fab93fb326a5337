"""Compile caches of engines: all below the environment's folder, and never in place of a user's own."""

import sys
from pathlib import Path

import pytest

from toolkit.engines import ENGINES, server
from toolkit.environments import compiled
from toolkit.stages import Interpreter


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_cache_lies_in_the_folder(engine, tmp_path):
    for value in ENGINES[engine]().caches(tmp_path).values():
        assert Path(value).is_relative_to(tmp_path)


def test_the_variables_are_those_that_the_engines_read(tmp_path):
    shared = {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"}
    shared |= {"CUDA_CACHE_PATH", "TILELANG_CACHE_DIR", "TVM_FFI_CACHE_DIR", "TORCH_EXTENSIONS_DIR"}
    assert set(ENGINES["vllm"]().caches(tmp_path)) - shared == {
        *("VLLM_CACHE_ROOT", "DG_JIT_CACHE_DIR")
    }
    assert set(ENGINES["sglang"]().caches(tmp_path)) - shared == {
        *("SGLANG_CACHE_DIR", "SGLANG_DG_CACHE_DIR", "SGLANG_JIT_CACHE_DIR")
    }


def test_a_folder_that_the_user_chose_stays(monkeypatch, tmp_path):
    from tests.unit.test_engine_argv import deployment
    from toolkit.engines import Command

    monkeypatch.setenv("TRITON_CACHE_DIR", "/fast/triton")
    given = Interpreter(Path(sys.executable), variables={"VLLM_CACHE_ROOT": "/fast/vllm"})
    environ = server._environ(ENGINES["vllm"](), given, deployment(), Command(("x",)))
    assert environ["TRITON_CACHE_DIR"] == "/fast/triton"
    assert environ["VLLM_CACHE_ROOT"] == "/fast/vllm"
    assert environ["TORCHINDUCTOR_CACHE_DIR"] == str(compiled.folder(given) / "inductor")
