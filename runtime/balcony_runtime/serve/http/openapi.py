"""The server's own OpenAPI document, made from the routes and the tables of their fields.

Owns the form of the document. Summaries are the first lines of the endpoints' docstrings.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from starlette.routing import Route

from balcony_runtime.serve.bodies.fields import FOREIGN, Table
from balcony_runtime.serve.bodies.refusal import RefusedError

#: Endpoints whose answer is not JSON → its type.
_TYPES = {"/": "text/html", "/metrics": "text/plain"}
#: Version of the code that runs: an upgrade may replace the files of the package while a server runs.
VERSION = version("balcony-edge")


def document(
    routes: Sequence[Route], bodies: Mapping[str, Table], queries: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, Any]:
    """The document.

    Args:
        routes: the endpoints.
        bodies: path → fields of its body; a path without a body is not there.
        queries: path → parameter of its posts → what it may be.
    """
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for method in sorted(route.methods or ()):
            if method != "HEAD":
                paths.setdefault(route.path_format, {})[method.lower()] = _operation(
                    route, bodies.get(route.path), queries.get(route.path, {})
                )
    error = RefusedError(400, "", "").body["error"]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Balcony Edge", "version": VERSION},
        "paths": paths,
        "components": {
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": list(error),
                            "properties": {name: {"type": ["string", "null"]} for name in error},
                        }
                    },
                }
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(route: Route, fields: Table | None, queries: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    types = [_TYPES.get(route.path, "application/json")]
    if fields is not None and "stream" in fields:  # a completion
        types.append("text/event-stream")
    operation: dict[str, Any] = {
        "summary": (inspect.getdoc(route.endpoint) or "").partition("\n")[0],
        "responses": {
            "200": {"description": "The answer.", "content": {kind: {} for kind in types}},
            "default": {
                "description": "An error.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    given = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "integer" if kind == "int" else "string"}}
        for name, kind in re.findall(r"{(\w+):(\w+)}", route.path)
    ]
    given += [{"name": name, "in": "query", "schema": {"enum": list(allowed)}} for name, allowed in queries.items()]
    if given:
        operation["parameters"] = given
    if fields is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _body(fields)}}}
    return operation


def _body(fields: Table) -> dict[str, Any]:
    properties: dict[str, Any] = {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in fields.items()}
    if "stream" in fields:  # a completion
        properties |= {
            name: {"enum": [*harmless, None], "description": "Not supported: only values that ask for nothing."}
            for name, harmless in FOREIGN.items()
        }
    asked = ("messages", "prompt", "input", "tokens")
    required = [name for name in asked if name in fields and "content" not in fields]
    return {"type": "object", "properties": properties, "required": required}
