"""The front's OpenAPI document: exactly the paths that it answers, with this server's caps."""

from __future__ import annotations

from typing import Any

from toolkit import __version__
from toolkit.gateway.requests import BODIES
from toolkit.recipe.front import FrontSection

REF = "#/components/schemas/"
SUMMARIES = {
    "/v1/chat/completions": "An answer to a conversation",
    "/v1/completions": "A continuation of a text",
    "/v1/embeddings": "Vectors of texts",
    "/v1/models": "What is served",
    "/v1/models/{model}": "One model of what is served",
    "/healthz": "Whether the server runs",
    "/readyz": "Whether it takes requests",
    "/metrics": "For Prometheus",
    "/toolkit/certificate": "What was proven of what is served",
    "/openapi.json": "This document",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
REFUSALS = {
    "400": "The request is wrong",
    "401": "Who asks is not known",
    "403": "Who asks may not ask this",
    "404": "There is no such model or path",
    "408": "The body did not come",
    "413": "The body is too large",
    "429": "Too much was asked",
    "500": "The engine failed",
    "502": "The engine went away",
    "503": "The server is starting, stopping or full",
    "504": "The engine did not answer",
}


def document(section: FrontSection) -> dict[str, Any]:
    """The document of a server with these settings."""
    schemas: dict[str, Any] = {"Error": ERROR}
    paths = {path: {"post": _post(path, section, schemas)} for path in BODIES}
    for path in SUMMARIES:
        if path not in BODIES:
            paths[path] = {"get": _get(path)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "toolkit", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"bearer": []}] if section.keys or section.jwt else [],
    }


def _post(path: str, section: FrontSection, schemas: dict[str, Any]) -> dict[str, Any]:
    model = BODIES[path]
    schema = model.model_json_schema(ref_template=REF + "{model}")
    schemas.update(schema.pop("$defs", {}))
    for name, largest in (
        ("n", section.limits.max_n),
        ("best_of", section.limits.max_n),
        ("max_tokens", section.limits.max_tokens),
        ("max_completion_tokens", section.limits.max_tokens),
    ):
        if name in schema["properties"] and largest is not None:
            schema["properties"][name]["anyOf"][0]["maximum"] = largest
    schemas[model.__name__] = schema
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if path != "/v1/embeddings":
        content["text/event-stream"] = {}
    return {
        "summary": SUMMARIES[path],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": REF + model.__name__}}},
        },
        "responses": {"200": {"description": "The answer", "content": content}}
        | {status: _refused(text) for status, text in REFUSALS.items()},
    }


def _get(path: str) -> dict[str, Any]:
    kind = "text/plain" if path == "/metrics" else "application/json"
    schema: dict[str, Any] = {"type": "string" if path == "/metrics" else "object"}
    operation: dict[str, Any] = {
        "summary": SUMMARIES[path],
        "responses": {
            "200": {"description": "The answer", "content": {kind: {"schema": schema}}},
            **{
                status: _refused(REFUSALS[status]) for status in ("401", "403", "404", "429", "503")
            },
        },
    }
    if path.endswith("{model}"):
        name = {
            "name": "model",
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1},
        }
        operation["parameters"] = [name]
    if path in {"/healthz", "/readyz", "/openapi.json"}:
        operation["security"] = []
    return operation


def _refused(text: str) -> dict[str, Any]:
    return {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": REF + "Error"}}},
    }
