"""Building with the real uv, from a lock of one small wheel in a folder: no network, a second each."""

import base64
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile

import pytest

from toolkit import environments, resources
from toolkit.environments import build, from_lock, load_lock, read_record, sync
from toolkit.errors import NotInstalledError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def make_wheel(folder, name="pebble", version="1.0"):
    """A wheel with one module and one script."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"def main(): print('{name} {version}')\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
    }
    rows = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        rows.append(f"{path},sha256={digest.decode()},{len(text)}\n")
    target = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", "".join(rows) + f"{info}/RECORD,,\n")
    return target


@pytest.fixture
def locks(monkeypatch, tmp_path):
    """A folder of locks with one, ``small-cpu``; uv sees a folder of wheels and no index."""
    (tmp_path / "wheels").mkdir()
    digest = hashlib.sha256(make_wheel(tmp_path / "wheels").read_bytes()).hexdigest()
    folder = tmp_path / "locks"
    folder.mkdir()
    write_lock(folder, f"pebble==1.0 \\\n    --hash=sha256:{digest}\n")
    monkeypatch.setattr(resources, "locks", lambda: folder)
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    (tmp_path / "wheels" / "torch-1+cpu-py3-none-any.whl").touch()  # so that no index is asked for
    return folder


def write_lock(folder, requirements, python=PYTHON):
    (folder / "small-cpu.in").write_text("pebble\n")
    (folder / "small-cpu.txt").write_text(f"# python: {python}\n{requirements}")


def test_sync_builds_what_the_lock_says(locks):
    environment = from_lock("small-cpu")
    said = []
    built = sync(environment, said.append)
    assert built == read_record(environment)
    assert (built.lock, built.packages, built.python) == ("small-cpu", 1, PYTHON)
    assert built.digest == load_lock("small-cpu").digest
    assert built.size_bytes > 10_000
    assert f"making a venv with Python {PYTHON}" in said
    python = environment.interpreter().python
    done = subprocess.run([python, "-m", "pebble"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_scripts_run_from_the_folder_that_the_build_was_renamed_to(locks):
    environment = from_lock("small-cpu")
    sync(environment)
    script = environment.python.parent / "pebble"
    assert ".part" not in script.read_text()
    assert subprocess.check_output([script], text=True) == "pebble 1.0\n"


def test_a_second_sync_is_free(locks, monkeypatch):
    environment = from_lock("small-cpu")
    first = sync(environment)
    monkeypatch.setattr(build, "_uv", None)  # it would fail if it were called
    assert sync(environment) == first


def test_nobody_else_may_read_the_cache(locks):
    environment = from_lock("small-cpu")
    sync(environment)
    assert environment.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_changed_lock_is_another_environment(locks):
    before = from_lock("small-cpu")
    sync(before)
    (locks / "small-cpu.txt").write_text(load_lock("small-cpu").text + "# changed\n")
    after = from_lock("small-cpu")
    assert after.path != before.path
    assert not after.is_ready
    assert before.is_ready


def test_a_killed_build_leaves_nothing_that_counts_and_the_next_one_succeeds(locks):
    environment = from_lock("small-cpu")
    script = (
        "import os, signal, sys; from pathlib import Path; from toolkit import environments, resources\n"
        f"resources.locks = lambda: Path({str(locks)!r})\n"
        "def die(text):\n"
        "    if 'packages' in text: os.kill(os.getpid(), signal.SIGKILL)\n"
        "environments.sync(environments.from_lock('small-cpu'), die)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    part = environment.path.with_name(f"{environment.path.name}.part")
    assert part.is_dir()
    assert not environment.is_ready
    assert not environment.path.exists()
    sync(environment)
    assert environment.is_ready
    assert not part.exists()


def test_a_folder_that_lost_its_record_is_built_again(locks):
    environment = from_lock("small-cpu")
    sync(environment)
    (environment.path / "toolkit.json").unlink()
    (environment.path / "junk").touch()
    sync(environment)
    assert environment.is_ready
    assert not (environment.path / "junk").exists()


def test_two_builds_of_one_lock_wait_for_each_other(locks):
    environment = from_lock("small-cpu")
    environment.path.parent.mkdir(parents=True)
    lock = environment.path.with_name(f"{environment.path.name}.lock")
    other = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    said = []

    def report(text):
        said.append(text)
        if len(said) == 2:
            os.close(other)

    sync(environment, report)
    assert said[:2] == ["waiting for another process that builds it"] * 2
    assert environment.is_ready


def test_a_part_that_is_being_worked_on_is_not_stale(locks):
    environment = from_lock("small-cpu")
    folder = environment.path.parent
    part = folder / f"{environment.path.name}.part"
    part.mkdir(parents=True)
    assert build.stale_parts(folder) == [part]
    lock = os.open(folder / f"{environment.path.name}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert build.stale_parts(folder) == []
    os.close(lock)
    assert build.stale_parts(folder) == [part]


def test_a_file_that_is_not_the_locked_one_is_refused(locks):
    write_lock(locks, "pebble==1.0 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(NotInstalledError) as caught:
        sync(from_lock("small-cpu"))
    assert "a package is not the file that the lock names" in caught.value.message
    assert "make lock" in caught.value.hint
    assert not from_lock("small-cpu").is_ready


def test_a_package_that_is_nowhere_shows_what_uv_said(locks):
    write_lock(locks, "boulder==2.0 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(NotInstalledError) as caught:
        sync(from_lock("small-cpu"))
    assert "environment small-cpu cannot be built; uv said:" in caught.value.message
    assert "boulder" in caught.value.message
    assert caught.value.hint.startswith("the whole log: ")


def test_a_python_that_cannot_be_had_is_named(locks):
    write_lock(locks, "pebble==1.0 --hash=sha256:" + "0" * 64 + "\n", python="3.99")
    with pytest.raises(NotInstalledError) as caught:
        sync(from_lock("small-cpu"))
    assert "Python 3.99 is not on this machine and uv could not download it" in (
        caught.value.message
    )
    assert caught.value.hint.startswith("install python3.99")


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        ("error: Failed to fetch: `https://download.pytorch.org/whl/cpu/torch/`\n  cause: error sending request",
         "PyTorch's index could not be read", "set UV_FIND_LINKS to a folder"),
        ("Because there is no version of torch==2.13.0+cpu and you require torch==2.13.0+cpu",
         "torch 2.13.0+cpu was not found", "the wheel of torch 2.13.0+cpu"),
        ("cause: failed to write: No space left on device (os error 28)", "the disk is full", "TOOLKIT_CACHE"),
        ("error: Failed to fetch: `https://x/simple/a/`\n  cause: error sending request for url",
         "the package index could not be reached", "UV_DEFAULT_INDEX"),
        ("Failed to download `https://x/python-build-standalone/releases/a.tar.gz`\n cause: error sending request",
         "Python 3.11 is not on this machine", "install python3.11"),
    ],
)  # fmt: skip
def test_what_uv_says_is_explained(tmp_path, said, message, hint):
    error = build.explain(said, load_lock("train-cpu"), tmp_path / "log")
    assert message in error.message
    assert hint in error.hint
    assert str(tmp_path / "log") in error.message


def test_an_interpreter_of_a_profile_needs_no_build(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path))
    assert sync(environments.resolve("core")) is None
    assert list(tmp_path.iterdir()) == []


def test_the_record_is_json_for_others(locks):
    environment = from_lock("small-cpu")
    sync(environment)
    record = json.loads((environment.path / "toolkit.json").read_text())
    assert set(record) == {"lock", "digest", "python", "packages", "size_bytes", "seconds"}
