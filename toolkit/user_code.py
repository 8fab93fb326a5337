"""The user's own functions, which a recipe names as ``file.py:function``: rows and metrics."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from toolkit.errors import ToolkitError
from toolkit.recipe.paths import file_of, resolve_path
from toolkit.registry import close_match


class UserFunction(NamedTuple):
    """A function and the file it is from."""

    call: Callable[..., Any]
    file: Path


def load_function(
    reference: str, folder: Path, *, who: str, error: type[ToolkitError], signature: str
) -> UserFunction:
    """Import a function from a file of the user's.

    Args:
        reference: ``file.py:function``.
        folder: The recipe's folder, where relative paths start.
        who: What errors begin with.
        error: Their type.
        signature: How such a function is written, for the hint.

    Raises:
        ToolkitError: As ``error``: there is no such file or function, or the file does not import.
    """
    path = resolve_path(file_of(reference), folder)
    name = reference.rpartition(":")[2]
    if not path.is_file():
        raise error(f"{who}: there is no file {path}", "the path is relative to the recipe")
    module = _module(path, who, error)
    function = getattr(module, name, None)
    if not callable(function):
        names = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise error(
            f"{who}: {path.name} has no function {name!r}{close_match(name, names)}",
            f"it has {', '.join(names) or 'none'}; write {signature}",
        )
    return UserFunction(function, path)


def _module(path: Path, who: str, error: type[ToolkitError]) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise error(f"{who}: {path} is not a Python file", "write 'file.py:function'")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it is made
    sys.path.insert(0, str(path.parent))  # so that the file can import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as cause:  # the user's code may raise anything
        said = f"{type(cause).__name__}: {cause}{line_in(cause, path)}"
        raise error(f"{who}: {path.name} cannot be imported: {said}", "mend the file") from cause
    finally:
        sys.path.remove(str(path.parent))
    return module


def line_in(error: BaseException, path: Path) -> str:
    """``" (line 12)"``: the innermost line of the user's file in the traceback; empty without one."""
    line, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            line = step.tb_lineno
        step = step.tb_next
    return "" if line is None else f" (line {line})"
