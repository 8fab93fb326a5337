"""Tests that need torch run in a stage's environment; the core's pytest skips their folders."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = [] if find_spec("torch") else ["in_*"]


@pytest.fixture(scope="session")
def warm_cache() -> Callable[[Path], Path]:
    """Makes a cache of a test's own that has what engines compiled and found out about models already.

    A start that finds nothing there imports vLLM once more; ``test_real_vllm_is_supervised.py`` sees such a start.
    """
    from toolkit.workspace import cache_root, private_folder

    compiled = private_folder(cache_root().absolute() / "compiled")

    def make(folder: Path) -> Path:
        private_folder(folder)
        (folder / "compiled").symlink_to(compiled)
        return folder

    return make
