"""What a submission keeps, so that later edits change nothing: recipe, lock, code, and the files that the recipe names.

::

    <workspace>/jobs/
    ├── code/<digest>/toolkit/      this package, once for each version of it
    └── <chain>/
        ├── recipe.yaml             resolved: --set applied, `auto` decided
        ├── toolkit.lock            as it was
        ├── git.json                commit and diff of the recipe's repository
        └── source/<absolute path of the recipe's folder>/...

The tree under ``source`` repeats absolute paths, so that ``../data.jsonl`` in a recipe leads to the copy. Code
and files up to COPY_BYTES are copied; what is larger (model folders) is a link, and the job refuses it when its digest
is no longer the one that was submitted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from toolkit import resources
from toolkit.launch.folder import write
from toolkit.lock import NAME
from toolkit.observe import local_files
from toolkit.prepare import Prepared
from toolkit.recipe.load import Loaded
from toolkit.recipe.paths import resolve_path
from toolkit.recipe.recipe import Recipe
from toolkit.tracking.describe import GitState, git_state
from toolkit.workspace import private_folder

COPY_BYTES = 64 * 2**20
"""Larger files of the user are linked."""
SKIPPED = ("__pycache__", "node_modules")


def code_digest() -> str:
    """Sha256 (hex) of this package's files by name, size and content."""
    total = hashlib.sha256()
    for path in _package_files():
        total.update(f"{path.relative_to(resources.PACKAGE)}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _package_files() -> Iterator[Path]:
    for folder, below, names in os.walk(resources.PACKAGE):
        below[:] = sorted(name for name in below if name not in (*SKIPPED, "_data"))
        yield from (Path(folder, name) for name in sorted(names) if not name.endswith(".pyc"))


def keep_code(jobs: Path, digest: str) -> Path:
    """The folder that holds a copy of this package; put it first on ``PYTHONPATH``."""
    folder = jobs / "code" / digest[:16]
    if not folder.exists():
        part = private_folder(folder.parent) / f".{folder.name}.{os.getpid()}"
        shutil.copytree(
            resources.PACKAGE,
            part / "toolkit",
            ignore=shutil.ignore_patterns("_data"),
            symlinks=True,
        )
        try:
            part.rename(folder)
        except OSError:  # another submitter was faster
            shutil.rmtree(part)
    return folder


def keep_recipe(prepared: Prepared, chain: Path) -> tuple[Path, GitState | None]:
    """Write recipe, lock, git state and source into a chain's folder; the recipe's folder in it, and the git state."""
    loaded = prepared.loaded
    tree = yaml.safe_dump(
        loaded.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True
    )
    (chain / "recipe.yaml").write_text(tree, encoding="utf-8")
    origin = loaded.directory.absolute()
    if (origin / NAME).is_file():
        shutil.copy2(origin / NAME, chain / NAME)
    state = git_state(origin)
    if state:
        write(chain / "git.json", {"commit": state.commit, "diff": state.diff})
    return keep_files(loaded, chain), state


def keep_files(loaded: Loaded, folder: Path) -> Path:
    """Bring a recipe and the files that it names into a folder's ``source``; the recipe's folder in it."""
    origin, root = loaded.directory.absolute(), folder / "source"
    if loaded.path.is_file():
        _bring(loaded.path.absolute(), root)
    for path in named_files(loaded.recipe, origin):
        _bring(path, root)
    return private_folder(_mirror(origin, root))


def named_files(recipe: Recipe, origin: Path) -> list[Path]:
    """Files that the recipe names by a relative path, absolute: only those lead into the mirror."""
    texts = {text for text, _ in local_files(recipe) if not text.startswith(("/", "~"))}
    return sorted(Path(os.path.normpath(resolve_path(text, origin))) for text in texts)


def _bring(path: Path, root: Path) -> None:
    """Put one of the user's files into the mirror; of Python files the neighbours too, which they may import."""
    target = _mirror(path, root)
    private_folder(target.parent)
    if path.suffix == ".py" and path.is_file():
        for neighbour in sorted(path.parent.iterdir()):
            if not neighbour.name.startswith("."):
                _place(neighbour, _mirror(neighbour, root), code=True)
    _place(path, target)


def _place(path: Path, target: Path, *, code: bool = False) -> None:
    """Copy code and small files; link what is large, and what only lies beside code."""
    if target.is_symlink() or target.exists():
        if not target.is_symlink() or code:
            return
        target.unlink()
    if path.is_file() and (path.suffix == ".py" or (not code and _small([path]))):
        shutil.copy2(path, target)
    elif path.is_dir() and _copied(path, code=code):
        shutil.copytree(path, target, ignore=shutil.ignore_patterns(*SKIPPED))
    else:
        target.symlink_to(path)


def _copied(folder: Path, *, code: bool) -> bool:
    """Whether a folder is copied: a small package of the user's, or a small folder that the recipe names."""
    wanted = (folder / "__init__.py").is_file() if code else True
    return wanted and _small(path for path in folder.rglob("*") if path.is_file())


def _small(files: Iterable[Path]) -> bool:
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > COPY_BYTES:
            return False
    return True


def _mirror(path: Path, root: Path) -> Path:
    return root / str(path.absolute()).lstrip("/")
