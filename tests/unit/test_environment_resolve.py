"""Which interpreter a logical name means."""

import subprocess
import sys

import pytest

from toolkit.environments import detect_accelerator, load_lock, resolve
from toolkit.errors import NotInstalledError, UsageError
from toolkit.launch.profiles import EnvironmentSection, EnvironmentsSection, Profile


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def with_train(**values):
    return Profile(
        name="here", environments=EnvironmentsSection(train=EnvironmentSection(**values))
    )


@pytest.mark.parametrize(
    ("name", "accelerator", "lock"),
    [
        ("train", "cpu", "train-cpu"),
        ("train", "cuda", "train-cuda"),
        ("quantize", "cpu", "quantize-cpu"),
        ("vllm", "cpu", "vllm-cpu"),
        ("vllm", "cuda", "vllm-cuda"),
        ("sglang", "cuda", "sglang-cuda"),
        ("sglang", "cpu", "sglang-cuda"),
    ],
)
def test_the_accelerator_makes_a_name_a_lock(name, accelerator, lock):
    found = resolve(name, accelerator=accelerator)
    assert (found.name, found.lock, found.digest) == (name, lock, load_lock(lock).digest)


def test_core_is_the_python_that_runs():
    core = resolve("core")
    assert str(core.interpreter().python) == sys.executable
    assert core.digest == load_lock("core").digest


def test_an_explicit_accelerator_wins_over_the_profile_s():
    profile = Profile(name="p", accelerator="cuda")
    assert resolve("train", profile=profile).lock == "train-cuda"
    assert resolve("train", accelerator="cpu", profile=profile).lock == "train-cpu"


def test_auto_looks_for_a_device(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect_accelerator() == "cuda"
    assert resolve("train").lock == "train-cuda"
    assert Profile(name="p").device == "cuda"
    assert Profile(name="p", accelerator="cpu").device == "cpu"


def test_what_is_not_built_names_the_command_that_builds_it():
    with pytest.raises(NotInstalledError) as caught:
        resolve("vllm", accelerator="cpu").interpreter()
    assert caught.value.message == "environment 'vllm' (lock vllm-cpu) is not built"
    assert caught.value.hint == "toolkit env sync vllm"
    assert caught.value.exit_code == 3


def test_a_folder_without_its_record_is_not_ready(cache):
    environment = resolve("train", accelerator="cpu")
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    assert not environment.is_ready
    (environment.path / "toolkit.json").write_text("{}")
    assert environment.is_ready


def test_an_environment_whose_python_is_gone_is_not_ready(tmp_path):
    environment = resolve("train", accelerator="cpu")
    environment.python.parent.mkdir(parents=True)
    (environment.path / "toolkit.json").write_text("{}")
    environment.python.symlink_to(tmp_path / "uninstalled")
    assert not environment.is_ready


def test_a_profile_gives_another_lock():
    found = resolve("train", accelerator="cpu", profile=with_train(lock="train-cuda"))
    assert (found.name, found.lock) == ("train", "train-cuda")


def test_a_profile_gives_an_interpreter_with_its_pythonpath(tmp_path):
    (tmp_path / "site").mkdir()
    profile = with_train(
        python=sys.executable, pythonpath=(str(tmp_path / "site"),), variables={"A": "1"}
    )
    interpreter = resolve("train", profile=profile).interpreter()
    assert str(interpreter.python) == sys.executable
    assert interpreter.environ()["PYTHONPATH"] == str(tmp_path / "site")
    assert interpreter.environ()["A"] == "1"


def test_a_bare_program_is_looked_up_on_path_and_home_and_variables_are_expanded(
    monkeypatch, tmp_path
):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mypython").symlink_to(sys.executable)
    (tmp_path / "bin" / "site").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path / "bin"))
    for python in ("mypython", "~/bin/mypython", "$WHERE/mypython"):
        profile = with_train(python=python, pythonpath=("~/bin/site", "$WHERE/site"))
        found = resolve("train", profile=profile)
        assert found.python == tmp_path / "bin" / "mypython"
        assert found.pythonpath == (tmp_path / "bin" / "site",) * 2
        assert found.is_ready


def test_what_a_profile_names_must_be_there(tmp_path):
    profile = with_train(python=sys.executable, pythonpath=(str(tmp_path / "gone"),))
    with pytest.raises(NotInstalledError) as caught:
        resolve("train", profile=profile).interpreter()
    assert f"the profile names {tmp_path / 'gone'}, which is not there" in caught.value.message
    assert caught.value.hint == "mend environments.train in the profile"


def test_the_digest_of_an_interpreter_is_that_of_its_entry():
    def digest(**values) -> str:
        return resolve("train", profile=with_train(**values)).digest

    one = digest(python="/usr/bin/python3", pythonpath=("/a", "/b"))
    assert one == digest(python="/usr/bin/python3", pythonpath=("/a", "/b"))
    others = {
        digest(python="/usr/bin/python4", pythonpath=("/a", "/b")),
        digest(python="/usr/bin/python3", pythonpath=("/b", "/a")),
        digest(python="/usr/bin/python3", pythonpath=("/a", "/b"), variables={"A": "1"}),
    }
    assert len(others | {one}) == 4
    assert all(len(d) == 64 for d in others)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError) as caught:
        resolve("trian")
    assert caught.value.message == "no environment is named 'trian' (did you mean 'train'?)"
    assert caught.value.hint == "known: core, train, quantize, vllm, sglang, router"


def test_resolving_imports_nothing_heavy():
    script = (
        "import sys; from toolkit.environments import resolve, Environment\n"
        "assert isinstance(resolve('train', accelerator='cpu'), Environment)\n"
        "print([m for m in ('pydantic', 'yaml', 'mlflow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr
