"""JSON Schema of recipes for editors, and the field reference: both from the models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType
from typing import Any, TypeGuard, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from toolkit.recipe.recipe import Recipe

_INTRO = """\
A recipe is one YAML file. Unknown keys are errors. Every key can be changed on the command line with
`--set section.key=value`; the value is YAML."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"

EXAMPLES: Mapping[str, list[Any]] = {
    "model.source": ["./models/my-base", "Qwen/Qwen3-8B", "models:/my-model@champion"],
    "model.revision": ["b968826d9c46dd6066d109eabc6255188de91218"],
    "data.sources": [[{"path": "rows.jsonl"}]],
    "data.sources.columns": [{"question": "prompt", "answer": "completion"}],
    "train.lora.targets": [["q_proj", "v_proj"]],
    "evaluate.metrics": [["exact_match", "metrics.py:close_enough"]],
    "evaluate.gates": [[{"of": "gptq", "metric": "exact_match", "max_drop": 0.03}]],
    "sweep.over": [{"train.lora.rank": [8, 16, 32], "train.learning_rate": [1e-4, 1e-3]}],
    "serve.adapters": [[{"name": "support", "path": "./adapters/support"}]],
}
"""Examples by key; editors offer them."""


def json_schema() -> dict[str, Any]:
    """Schema of a whole recipe, draft 2020-12; unknown keys are errors, descriptions Markdown."""
    schema = Recipe.model_json_schema()
    definitions = schema.get("$defs", {})
    for part in (schema, *definitions.values()):
        _tidy(part)
    for key, examples in EXAMPLES.items():
        field_at(schema, key)["examples"] = examples
    head = {"$schema": DIALECT, "title": "toolkit recipe"}
    return head | {k: v for k, v in schema.items() if k not in head}


def text() -> str:
    """The schema as it is committed in ``recipes/recipe.schema.json``."""
    return json.dumps(json_schema(), indent=2) + "\n"


def _tidy(part: dict[str, Any]) -> None:
    """Drop generated titles, which only repeat the key, and join docstring lines into one."""
    part.pop("title", None)
    part["markdownDescription"] = part["description"] = _flat(part.get("description", ""))
    for field in part.get("properties", {}).values():
        field.pop("title", None)
        if "description" in field:
            field["markdownDescription"] = field["description"] = _flat(field["description"])


def _flat(doc: str) -> str:
    return " ".join(doc.split())


def field_at(schema: dict[str, Any], key: str) -> dict[str, Any]:
    """The sub-schema of a dotted key; lists and optional sections are looked through."""
    part = schema
    for name in key.split("."):
        field: dict[str, Any] = _resolve(schema, part)["properties"][name]
        part = field
    return part


def _resolve(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in part:
        found: dict[str, Any] = schema["$defs"][part["$ref"].rpartition("/")[2]]
        return found
    inner = part.get("items") or next((p for p in part.get("anyOf", ()) if "$ref" in p), None)
    return _resolve(schema, inner) if inner else part


def reference(
    model: type[BaseModel] = Recipe, title: str = "Recipe reference", intro: str = _INTRO
) -> str:
    """Every key of a recipe (or of another strict YAML file) as Markdown, one table per section."""
    lines = [f"# {title}", "", intro, "", *_section("", model, {})]
    return "\n".join(lines).rstrip() + "\n"


def _section(
    prefix: str, model: type[BaseModel], seen: dict[type[BaseModel], str]
) -> Iterator[str]:
    shown = prefix.rstrip(".")
    if shown:
        yield f"## `{shown}`"
        yield ""
        yield f"As `{seen[model]}`." if model in seen else _flat(model.__doc__ or "")
        yield ""
    if model in seen:
        return
    seen[model] = shown
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    nested = []
    for name, info in model.model_fields.items():
        yield _row(name, info)
        if inner := _model_in(info.annotation):
            many = "[]" if _is_list(info.annotation) else ""
            nested.append((f"{prefix}{name}{many}.", inner))
    yield ""
    for path, inner in nested:
        yield from _section(path, inner, seen)


def _row(name: str, info: FieldInfo) -> str:
    default = (
        "required" if info.is_required() else _default(info.get_default(call_default_factory=True))
    )
    inner = _model_in(info.annotation)
    meaning = _flat(info.description or (inner.__doc__ if inner else "") or "")
    cells = (f"`{name}`", _type(info), default, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, BaseModel):
        return "see below"
    if value in ((), {}, ""):
        return "empty"
    plain = list(value) if isinstance(value, tuple) else value
    return f"`{json.dumps(plain)}`"


def _type(info: FieldInfo) -> str:
    return _bounded(_name(info.annotation), info.metadata)


def _bounded(text: str, rules: Iterable[Any]) -> str:
    bounds = [b for rule in rules if (b := _bound(rule))]
    return f"{text}, {', '.join(bounds)}" if bounds else text


def _bound(rule: Any) -> str | None:
    for kind, sign, key in ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt")):
        if isinstance(rule, kind):
            return f"{sign} {getattr(rule, key)}"
    if isinstance(rule, FieldInfo):
        return ", ".join(b for inner in rule.metadata if (b := _bound(inner))) or None
    return None


_PLAIN = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "any value"}


def _name(annotation: Any) -> str:
    """A type as a person would say it."""
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if _is_section(annotation):
        return "section"
    arguments = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _bounded(_name(arguments[0]), annotation.__metadata__)
    if get_origin(annotation) in (tuple, dict, Mapping):
        many = f"list of {_plural(_name(arguments[0]))}"
        return many if get_origin(annotation) is tuple else "mapping"
    words = (
        f"`{a}`" if isinstance(a, str | int) else _name(a) for a in arguments if a is not NoneType
    )
    return " or ".join(words)


def _plural(noun: str) -> str:
    return {"section": "sections", "integer": "integers"}.get(noun, noun)


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if _is_section(annotation):
        return annotation
    return next((found for a in get_args(annotation) if (found := _model_in(a))), None)
