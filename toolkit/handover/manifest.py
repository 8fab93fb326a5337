"""Manifests as YAML that every reader takes for the same values.

PyYAML reads YAML 1.1 and writes plain what is a string to it, but Go's readers, kubectl's among them, know other words:
``1e3`` is a number to them, ``0o17`` too, and ``y`` is true to old ones. So a string is quoted unless it is surely one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import yaml

_PLAIN = re.compile(r"--?[A-Za-z][A-Za-z0-9-]*|[A-Za-z/][A-Za-z0-9_./:@-]*[A-Za-z0-9]")
"""Options and words that no version of YAML takes for anything else; PyYAML itself quotes ``yes``, ``null``, ..."""


class _Dumper(yaml.SafeDumper):
    """Writes a value that stands twice in full twice: people read manifests, and anchors hide what is set."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Always."""
        return True


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if _PLAIN.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _string)


def dump(*objects: Mapping[str, Any]) -> str:
    """Objects as one YAML stream, in the order of their keys; no line is folded."""
    texts = [
        yaml.dump(dict(one), Dumper=_Dumper, sort_keys=False, width=sys.maxsize) for one in objects
    ]
    return "---\n".join(texts)
