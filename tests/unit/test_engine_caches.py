"""Compile caches: one folder per environment, private, and never in place of a user's own."""

import stat
import sys
from pathlib import Path

import pytest

from toolkit.engines import ENGINES, compiled, server
from toolkit.environments.resolve import RECORD
from toolkit.stages import Interpreter


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def built(tmp_path: Path, name: str) -> Interpreter:
    folder = tmp_path / "environments" / name
    (folder / "bin").mkdir(parents=True)
    (folder / RECORD).write_text("{}")
    return Interpreter(folder / "bin" / "python")


def test_each_lock_has_a_folder_of_its_own(tmp_path, cache):
    one, other = built(tmp_path, "vllm-cuda-aaaa"), built(tmp_path, "vllm-cuda-bbbb")
    assert compiled.folder(one) == cache / "compiled" / "vllm-cuda-aaaa"
    assert compiled.folder(other) == cache / "compiled" / "vllm-cuda-bbbb"
    assert stat.S_IMODE(compiled.folder(one).stat().st_mode) == 0o700


def test_a_given_interpreter_is_told_apart_by_its_packages():
    python = Path(sys.executable)
    plain = compiled.folder(Interpreter(python))
    assert plain == compiled.folder(Interpreter(python))
    assert plain != compiled.folder(Interpreter(python, (Path("/site"),)))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_cache_lies_in_the_folder(engine, tmp_path):
    for value in ENGINES[engine]().caches(tmp_path).values():
        assert Path(value).is_relative_to(tmp_path)


def test_the_variables_are_those_that_the_engines_read(tmp_path):
    shared = {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"}
    shared |= {"CUDA_CACHE_PATH", "TILELANG_CACHE_DIR", "TVM_FFI_CACHE_DIR"}
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
