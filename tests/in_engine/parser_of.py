"""Asks an engine's own parser. Runs in the engine's interpreter.

::

    python parser_of.py dump  vllm|sglang [--stub NAMES] > toolkit/engines/parsers/ENGINE-VERSION.json
    python parser_of.py judge vllm|sglang [--stub NAMES] < questions.json > answers.json

``dump`` writes ``{"engine", "version", "architectures", "flags"}``: what ``toolkit.engines.parsers`` reads. ``judge``
reads ``{"commands": {name: argv}, "said": [[text, ...], ...]}`` and writes ``{"complaints", "missing", "dump"}``: the
parser's error by command, and the lists of which no text stands in the engine's source. ``--stub triton,orjson``
replaces packages that are not there, so that a parser can be read on a machine that cannot run its engine.
"""

import argparse
import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock


class _Stub(types.ModuleType):
    """Any attribute of it is there; it is a package, so its submodules are too."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        value.driver.active.get_current_target.return_value.backend = (
            "cpu"  # asked of triton.runtime
        )
        return value


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last: a module that nobody finds becomes a stub, unless the engine itself looks for an alternative."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, fullname, path=None, target=None):
        known = fullname.partition(".")[0] in self.names or fullname in self.names
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


def vllm_parser():
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def sglang_parser():
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def vllm_names():
    """Architectures, and the parsers that the command line takes any word for."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    choices = {
        "--tool-call-parser": ToolParserManager.list_registered(),
        "--reasoning-parser": ReasoningParserManager.list_registered(),
    }
    return ModelRegistry.get_supported_archs(), choices


def sglang_names():
    """Architectures by the text of the model files: importing them needs kernels."""
    import sglang

    found = set()
    for file in (Path(sglang.__file__).parent / "srt" / "models").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8-sig")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EntryClass":
                members = getattr(node.value, "elts", [node.value])
                found |= {member.id for member in members if isinstance(member, ast.Name)}
    return found, {}


def describe(action):
    kind = getattr(action.type, "__name__", "").strip("_")
    numbers = {"int": "int", "float": "float", "human_readable_int": "tokens"}
    said = {"nargs": action.nargs, "type": numbers.get(kind)}
    if action.choices is not None:
        said["choices"] = [str(choice) for choice in action.choices if choice is not None]
    return {key: value for key, value in said.items() if value is not None}


def dump(engine, parser):
    version = __import__(engine).__version__.partition("+")[0]
    architectures, choices = {"vllm": vllm_names, "sglang": sglang_names}[engine]()
    flags = {
        flag: describe(action)
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--")
    }
    for flag, names in choices.items():
        flags[flag]["choices"] = sorted(names)
    return {
        "engine": engine,
        "version": version,
        "architectures": sorted(architectures),
        "flags": dict(sorted(flags.items())),
    }


def written(value):
    """JSON with one flag or architecture a line."""
    head = json.dumps({key: value[key] for key in ("engine", "version")})[:-1]
    names = ",\n".join(map(json.dumps, value["architectures"]))
    flags = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value["flags"].items())
    return f'{head}, "architectures": [\n{names}\n], "flags": {{\n{flags}\n}}}}\n'


def parse(parser, argv):
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parser.parse_args(argv)
    except (SystemExit, ValueError, TypeError, KeyError, argparse.ArgumentError) as error:
        return complaint.getvalue().strip().splitlines()[-1:] or [repr(error)]
    return None


def unsaid(engine, pieces):
    root = Path(importlib.util.find_spec(engine).origin).parent
    source = "\n".join(file.read_text(errors="replace") for file in root.rglob("*.py"))
    return [piece for piece in pieces if not any(text in source for text in piece)]


def main():
    verb, engine = sys.argv[1:3]
    names = sys.argv[sys.argv.index("--stub") + 1].split(",") if "--stub" in sys.argv else []
    if names:
        from transformers.utils import import_utils

        import_utils.is_torchvision_available()  # remembered: a stub is none
        sys.meta_path.append(_Missing(names))
    say, sys.stdout = sys.stdout, sys.stderr  # engines print while they are imported
    parser = {"vllm": vllm_parser, "sglang": sglang_parser}[engine]()
    if verb == "dump":
        say.write(written(dump(engine, parser)))
        return
    asked = json.load(sys.stdin)
    judged = {name: parse(parser, argv) for name, argv in asked["commands"].items()}
    answer = {
        "complaints": {name: said for name, said in judged.items() if said},
        "missing": unsaid(engine, asked["said"]),
        "dump": dump(engine, parser),
    }
    json.dump(answer, say)


main()
