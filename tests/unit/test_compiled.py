"""What stages compile is kept: one folder per environment, private, and never in place of a user's own."""

import errno
import json
import stat
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.test_stage_process import root, spec  # noqa: F401 - root is a fixture
from toolkit import stage_process
from toolkit.environments import compiled
from toolkit.environments.resolve import RECORD
from toolkit.stages import Interpreter
from toolkit.train.parallel.launch import Launch, rank_environ


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    for name in compiled.variables(tmp_path):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def built(tmp_path: Path, name: str) -> Interpreter:
    folder = tmp_path / "environments" / name
    (folder / "bin").mkdir(parents=True)
    (folder / RECORD).write_text("{}")
    return Interpreter(folder / "bin" / "python")


def test_each_lock_has_a_folder_of_its_own(tmp_path, cache):
    one, other = built(tmp_path, "train-cuda-aaaa"), built(tmp_path, "train-cuda-bbbb")
    assert compiled.folder(one) == cache / "compiled" / "train-cuda-aaaa"
    assert compiled.folder(other) == cache / "compiled" / "train-cuda-bbbb"
    assert stat.S_IMODE(compiled.folder(one).stat().st_mode) == 0o700
    assert not list(compiled.folder(one).iterdir())


def test_a_given_interpreter_is_told_apart_by_its_packages():
    python = Path(sys.executable)
    plain = compiled.folder(Interpreter(python))
    assert plain == compiled.folder(Interpreter(python))
    assert plain != compiled.folder(Interpreter(python, (Path("/site"),)))


def test_a_stage_and_its_ranks_are_told_the_folder_of_their_environment(tmp_path, cache):
    interpreter = built(tmp_path, "train-cuda-aaaa")
    environ = stage_process._environ(interpreter, spec(tmp_path))
    kept = cache / "compiled" / "train-cuda-aaaa"
    assert environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept / "inductor")
    assert environ["TRITON_CACHE_DIR"] == str(kept / "triton")
    assert environ["TORCH_EXTENSIONS_DIR"] == str(kept / "extensions")
    ranks = rank_environ(Launch(4), environ, 8)
    assert compiled.variables(kept).items() <= ranks.items()


def test_what_the_user_or_the_profile_set_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/fast/triton")
    interpreter = replace(
        built(tmp_path, "a"), variables={"TORCHINDUCTOR_CACHE_DIR": "/fast/torch"}
    )
    environ = stage_process._environ(interpreter, spec(tmp_path))
    assert environ["TRITON_CACHE_DIR"] == "/fast/triton"
    assert environ["TORCHINDUCTOR_CACHE_DIR"] == "/fast/torch"
    assert environ["CUDA_CACHE_PATH"] == str(compiled.folder(interpreter) / "nv")


def test_a_stage_of_the_core_hands_nothing_on_to_its_engines(tmp_path, cache):
    given = spec(tmp_path)
    of_core = replace(given, environments={"core": given.environments["train"]})
    environ = stage_process._environ(stage_process._interpreter(of_core), of_core)
    assert not compiled.variables(tmp_path).keys() & environ.keys()
    assert not cache.exists()


def no_room(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("broken", ["full", "not writable"])
def test_a_cache_that_cannot_be_written_stops_nothing(broken, tmp_path, cache, monkeypatch):
    if broken == "full":
        monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
    else:
        cache.mkdir()
        (cache / "compiled").touch()
    environ = stage_process._environ(built(tmp_path, "a"), spec(tmp_path))
    assert not compiled.variables(tmp_path).keys() & environ.keys()


def test_no_step_file_and_so_no_fingerprint_has_them(root):  # noqa: F811 - the fixture
    step = spec(root)
    stage_process._environ(stage_process._interpreter(step), step)
    written = step.write().read_text()
    assert json.loads(written)["interpreters"]["train"]["variables"] == {}
    assert not any(name in written for name in compiled.variables(root))
