"""The guard against real process trees: children that ignore SIGTERM, that leave the session, that are killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from toolkit.engines import guard, orphans

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard needs Linux")

TREE = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
stubborn = (
    "import signal, time, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "open(sys.argv[1], 'w').close(); time.sleep(300)"
)
children = [
    subprocess.Popen([sys.executable, "-c", stubborn, str(folder / "a")]),
    subprocess.Popen([sys.executable, "-c", stubborn, str(folder / "b")], start_new_session=True),
]
while not ((folder / "a").exists() and (folder / "b").exists()):
    time.sleep(0.01)
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), (folder / "drained").touch(), os._exit(0)))
(folder / "pids.part").write_text(" ".join(str(p) for p in [os.getpid(), *(c.pid for c in children)]))
(folder / "pids.part").rename(folder / "pids")
time.sleep(300)
"""


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    return orphans.records_folder()


def command(folder: Path, records: Path, *options: str) -> list[str]:
    guarded = [sys.executable, "-c", TREE, str(folder)]
    return [
        sys.executable,
        "-I",
        "-S",
        guard.__file__,
        "--records",
        str(records),
        *options,
        "--",
        *guarded,
    ]


def start(folder: Path, records: Path, *options: str) -> tuple[subprocess.Popen, list[int]]:
    process = subprocess.Popen(
        command(folder, records, *options), stdin=subprocess.PIPE, start_new_session=True
    )
    return process, wait_for_pids(folder)


def wait_for_pids(folder: Path) -> list[int]:
    wait_until((folder / "pids").exists)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def wait_until(true, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if guard.start_time(pid) is not None]


def test_closing_the_pipe_ends_the_whole_tree(tmp_path, records):
    process, pids = start(tmp_path, records)
    assert len(alive(pids)) == 3
    process.stdin.close()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert alive(pids) == []
    assert list(records.iterdir()) == []


def test_killing_the_starter_ends_the_whole_tree(tmp_path, records):
    code = (
        f"import subprocess, time; subprocess.Popen({command(tmp_path, records)!r},"
        "stdin=subprocess.PIPE, start_new_session=True); time.sleep(300)"
    )
    toolkit = subprocess.Popen([sys.executable, "-c", code])
    pids = wait_for_pids(tmp_path)
    toolkit.kill()
    toolkit.wait()
    wait_until(lambda: alive(pids) == [])


def test_sigterm_lets_the_first_process_drain_and_then_ends_the_rest(tmp_path, records):
    process, pids = start(tmp_path, records)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert (tmp_path / "drained").exists()
    assert alive(pids) == []
    process.stdin.close()


def test_killing_the_engines_first_process_ends_its_children(tmp_path, records):
    process, pids = start(tmp_path, records)
    os.kill(pids[0], signal.SIGKILL)
    assert process.wait(20) == 128 + signal.SIGKILL
    assert alive(pids) == []
    process.stdin.close()


def test_after_killing_the_guard_the_kernel_ends_the_engine_and_reap_the_rest(tmp_path, records):
    process, pids = start(tmp_path, records)
    process.kill()
    process.wait()
    wait_until(lambda: pids[0] not in alive(pids))
    assert alive(pids) == pids[1:], (
        "children ignore SIGTERM and have no reason to end by themselves"
    )
    assert sorted(orphans.reap()) == sorted(pids[1:])
    assert alive(pids) == []
    assert list(records.iterdir()) == []
    process.stdin.close()


def test_a_process_that_wiped_its_environment_is_found_by_its_session(tmp_path, records):
    # vLLM's EngineCore renames itself, which overwrites the memory that /proc/PID/environ shows.
    code = "import time, sys, os; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(300)"
    tree = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-c', {code!r}, sys.argv[1]], env={{}}); time.sleep(300)"
    )
    file = tmp_path / "child"
    options = ["--records", str(records), "--", sys.executable, "-c", tree, str(file)]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, *options],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    wait_until(lambda: file.exists() and file.read_text())
    child = int(file.read_text())
    assert guard.MARK.encode() not in Path(f"/proc/{child}/environ").read_bytes()
    process.kill()
    process.wait()
    assert child in orphans.reap()
    assert alive([child]) == []
    process.stdin.close()


def test_reap_leaves_the_living_alone(tmp_path, records):
    process, pids = start(tmp_path, records)
    assert orphans.reap() == []
    assert len(alive(pids)) == 3
    process.stdin.close()
    process.wait(20)


def test_a_detached_engine_outlives_its_starter(tmp_path, records):
    process, pids = start(tmp_path, records)
    process.stdin.write(b"d")
    process.stdin.close()
    time.sleep(1)
    assert len(alive(pids)) == 3
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    assert alive(pids) == []


def test_an_engine_that_ignores_sigterm_is_killed_after_its_grace(tmp_path, records):
    code = textwrap.dedent(TREE).replace(
        "signal.signal(signal.SIGTERM, lambda",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); (lambda",
    )
    argv = command(tmp_path, records, "--grace", "0.5")
    argv[-2] = code
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
    pids = wait_for_pids(tmp_path)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    assert 0.5 < time.monotonic() - begin < 25
    assert alive(pids) == []
    process.stdin.close()


def test_the_exit_code_of_the_engine_is_the_guards(records):
    argv = [sys.executable, "-I", "-S", guard.__file__, "--records", str(records), "--"]
    keep = subprocess.Popen(
        [*argv, sys.executable, "-c", "raise SystemExit(7)"], stdin=subprocess.PIPE
    )
    assert keep.wait(20) == 7
    keep.stdin.close()
