"""Tests that need torch run in a stage's environment; the core's pytest skips their folders."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = [] if find_spec("torch") else ["in_*"]

LONGEST = (
    "test_recipe_to_served.py",
    "test_contract.py",
    "test_chaos.py",
    "test_chaos_with_vllm.py",
    "test_proofs_with_vllm.py",
    "test_preflight_agrees_with_vllm.py",
    # of the train environment
    "test_ranks.py",
    "test_out_of_memory_on_ranks.py",
    "test_objectives_on_ranks.py",
    "test_objectives.py",
    "test_fetch_gguf.py",
    "test_training_benchmark.py",
    "test_launch.py",
)
"""Files of minutes each. A worker takes a whole file: these go first, so that none of them is left for the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


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
