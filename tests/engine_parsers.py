"""What the parser tests on the CPU and on the GPU host share: ask the real engine with ``in_engine/parser_of.py``."""

import json
import subprocess
from pathlib import Path

from tests.unit.test_engine_argv import CASES
from toolkit.engines import ENGINES
from toolkit.engines.failures import SGLANG, VLLM
from toolkit.engines.parsers import command_line, known_versions
from toolkit.stages import Interpreter

SCRIPT = Path(__file__).parent / "in_engine" / "parser_of.py"
FAILURES = {"vllm": VLLM, "sglang": SGLANG}


def questions(engine: str) -> dict:
    """Every golden command without interpreter and module, one that is wrong, and the texts of known failures."""
    commands = {
        name: ENGINES[engine]().command(Path("/python"), case, 8123).argv[3:]
        for name, case in CASES.items()
    }
    commands["wrong"] = (*commands["cuda-base"], "--no-such-flag")
    said = [list(failure.said) for failure in FAILURES[engine] if failure.said]
    return {"commands": commands, "said": said}


def judge(interpreter: Interpreter, engine: str) -> dict:
    """What the engine's own parser and source say to :func:`questions`; one process, because imports take long."""
    done = subprocess.run(
        [str(interpreter.python), str(SCRIPT), "judge", engine],
        input=json.dumps(questions(engine)),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=interpreter.environ() | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def differences(found: dict) -> list[str]:
    """Flags and architectures that the stored file has otherwise; none where no file has the installed version."""
    version = tuple(map(int, found["version"].split(".")))
    if version not in known_versions(found["engine"]):
        return []
    stored = command_line(found["engine"], version)
    flags = stored.flags.keys() | found["flags"].keys()
    changed = [
        f for f in flags if _unordered(stored.flags.get(f)) != _unordered(found["flags"].get(f))
    ]
    return [*changed, *(stored.architectures ^ set(found["architectures"]))]


def _unordered(flag: dict | None) -> dict | None:
    """Choices that an engine keeps in a set come in another order from each process."""
    if flag is None or "choices" not in flag:
        return flag
    return {**flag, "choices": sorted(flag["choices"], key=str)}
