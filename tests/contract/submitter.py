"""A recipe of two steps whose jobs only say that they ran: for tests of who submits it, with the real command."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.contract.world import World
from toolkit.launch import report

ROOT = Path(__file__).parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "vocab_size": 32,
    "dtype": "float32",
}
ROWS = """
def rows():
    return [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
"""
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
PYTHON = """#!/bin/sh
# Stands where the profile names an interpreter: the real shim, around a program that says that it ran and waits.
for folder; do :; done
printf '{"argv": ["%s/program", "%s"]}' "$(dirname "$0")" "$folder" > "$folder/command.json"
exec "{python}" "$@"
"""
PROGRAM = """#!/bin/sh
cd "$(dirname "$0")" || exit
basename "$1" >> ran
while [ ! -e go ]; do sleep 0.1; done
"""


class Submitter:
    """A folder from which ``toolkit run --on`` submits; jobs wait until :meth:`go`."""

    def __init__(self, folder: Path, backend: str, section: dict) -> None:
        self.folder = folder
        base = folder / "base"
        base.mkdir(parents=True)
        (base / "config.json").write_text(json.dumps(CONFIG))
        header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        weights = len(header).to_bytes(8, "little") + header + b"\0" * 4
        (base / "model.safetensors").write_bytes(weights)
        (base / "chat_template.jinja").write_text(TEMPLATE)
        (folder / "rows.py").write_text(ROWS)
        self._program("python", PYTHON.replace("{python}", sys.executable))
        self._program("program", PROGRAM)
        recipe = {
            "name": "colours",
            "model": {"source": "./base", "max_length": 64},
            "data": {"sources": [{"python": "rows.py:rows"}]},
        }
        (folder / "colours.yaml").write_text(yaml.safe_dump(recipe))
        profile = {
            "name": "there",
            "backend": backend,
            "accelerator": "cpu",
            "python": str(folder / "python"),
            backend: section,
        }
        (folder / "there.yaml").write_text(yaml.safe_dump(profile))

    def _program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    @property
    def jobs(self) -> Path:
        return self.folder / "runs" / "jobs"

    def start(self, name: str) -> subprocess.Popen:
        """``toolkit run --detach`` as a process; its chain is named ``name-...``."""
        order = ("run", "colours.yaml", "--set", f"name={name}", "--on", "there.yaml", "--detach")
        return subprocess.Popen(
            [sys.executable, "-m", "toolkit", *order],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def again(self, name: str) -> str:
        """The same command, to its end; the chain's id."""
        with self.start(name) as process:
            out, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
        return out.strip()

    def go(self) -> None:
        (self.folder / "go").touch()

    def ran(self) -> list[str]:
        """Ids of the jobs whose program ran, once for each time."""
        file = self.folder / "ran"
        return sorted(file.read_text().split()) if file.exists() else []

    def chains(self) -> list[str]:
        return sorted(chain["id"] for chain in report.chains(self.jobs))

    def wait_until_over(self, chains: list[str], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not all(report.is_over(self.jobs / chain) for chain in chains):
            assert time.monotonic() < end, (self.ran(), World(self.folder).keeper_log())
            time.sleep(0.2)

    def processes(self) -> list[int]:
        """Of the jobs, wherever they went."""
        found, mark = [], str(self.jobs).encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if mark in words and b"toolkit.launch.keeper" not in words:
                    found.append(int(entry.name))
        return found

    def close(self) -> None:
        self.go()
        World(self.folder).close()
