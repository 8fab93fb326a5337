"""The uv program: where it is, and what it must be told about this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from toolkit.errors import NotInstalledError

_FROM_PIP = {
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
    "PIP_CERT": "SSL_CERT_FILE",
}
_EQUAL = {"UV_DEFAULT_INDEX": ("UV_INDEX_URL",), "UV_INDEX": ("UV_EXTRA_INDEX_URL",)}
_IN_THE_WAY = (
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "PYTHONHOME",
    "CONDA_PREFIX",
    "UV_REQUIRE_HASHES",
    "UV_SYSTEM_PYTHON",
)


def uv() -> str:
    """Path of the ``uv`` that came with the toolkit.

    Raises:
        NotInstalledError: The package ``uv`` is not there.
    """
    try:
        from uv import find_uv_bin

        return os.fspath(find_uv_bin())
    except (ImportError, FileNotFoundError) as cause:
        raise NotInstalledError("the program uv is not installed", "pip install uv") from cause


def uv_environ(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment for uv: pip's index, find-links and certificates, where uv has none of its own.

    uv reads none of pip's variables, yet a machine behind a mirror has usually been set up for pip.
    """
    env = {key: value for key, value in given.items() if key not in _IN_THE_WAY}
    for theirs, ours in _FROM_PIP.items():
        if given.get(theirs) and not any(given.get(key) for key in (ours, *_EQUAL.get(ours, ()))):
            # pip separates by blanks; uv's find-links by commas, its index by blanks
            separator = "," if ours == "UV_FIND_LINKS" else " "
            env[ours] = separator.join(given[theirs].split())
    return env


def torch_source(given: Mapping[str, str] = os.environ) -> list[str]:
    """Arguments that let uv find torch for the CPU: PyTorch's index unless find-links has it."""
    links = uv_environ(given).get("UV_FIND_LINKS", "")
    if any(_may_have_torch(link) for link in links.replace(",", " ").split()):
        return []
    return ["--torch-backend", "cpu"]


def _may_have_torch(link: str) -> bool:
    """Whether a find-links entry may have torch for the CPU; a remote page is not fetched."""
    parts = urlsplit(link)
    if parts.scheme not in ("", "file"):
        return True
    return any(Path(unquote(parts.path)).glob("torch-*+cpu*.whl"))
