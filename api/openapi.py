"""What Litestar can't know of our routes: bodies that handlers parse themselves, and how they fail."""

from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Request
from litestar.openapi.plugins import JsonRenderPlugin, YamlRenderPlugin
from litestar.openapi.spec import OpenAPIMediaType, Operation, Parameter, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIType

__all__ = ["JsonDocument", "PlainPath", "YamlDocument", "body_of", "with_failures"]

_PUBLIC = ("/health", "/ready")
_TIMED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/responses",
)
_WORDS = {
    400: "The request is invalid; `param` names the field",
    401: "It brings no API key, or one that is not valid",
    403: "The key is not for that",
    404: "Something that it names is not here",
    409: "Something of the kind is under way already",
    413: "Its body is too large",
    429: "A limit or a full queue: Retry-After says when to come again",
    500: "The server failed on it",
    503: "The server loads, stops, sleeps or has failed",
    504: "Its time passed before the answer began",
}
# What an answer's id is good for afterwards: path of the operation -> the paths that take it.
_LINKED = {
    "/v1/responses": ("/v1/responses/{response_id}", "/v1/responses/{response_id}/input_items",
                      "/v1/responses/{response_id}/cancel"),
    "/v1/files": ("/v1/files/{file_id}", "/v1/files/{file_id}/content"),
    "/v1/batches": ("/v1/batches/{batch_id}", "/v1/batches/{batch_id}/cancel"),
}  # fmt: skip
_OPENAI = {"$ref": "#/components/schemas/ErrorEnvelope"}
_ANTHROPIC = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        },
    },
    "required": ["type", "error"],
}


@dataclass
class _RawSchema(Schema):
    """A JSON schema that was made elsewhere."""

    raw: dict[str, Any] | None = None

    def to_schema(self) -> dict[str, Any]:
        return dict(self.raw or {})


@dataclass
class PlainPath(Operation):
    """An operation whose path parameter is any text, slashes included: no URI, as Litestar says."""

    def __post_init__(self) -> None:
        for parameter in self.parameters or []:
            if isinstance(parameter, Parameter) and isinstance(parameter.schema, Schema):
                parameter.schema.format = None


def body_of(kind: type[msgspec.Struct]) -> type[Operation]:
    """An OpenAPI operation whose body is `kind`, described inline."""
    _, components = msgspec.json.schema_components([kind])
    schema = _inline(components[kind.__name__], components)
    body = RequestBody(
        content={
            "application/json": OpenAPIMediaType(
                schema=_RawSchema(type=OpenAPIType.OBJECT, raw=schema)
            )
        },
        required=True,
    )

    @dataclass
    class DocumentedOperation(Operation):
        def __post_init__(self) -> None:
            self.request_body = body

    return DocumentedOperation


def _inline(node: Any, components: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        if "$ref" in node:
            return _inline(components[node["$ref"].rsplit("/", 1)[1]], components)
        return {key: _inline(value, components) for key, value in node.items()}
    if isinstance(node, list):
        return [_inline(item, components) for item in node]
    return node


def with_failures(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document where every operation has the statuses that it may fail with."""
    paths = {
        path: {
            method: operation | {"responses": _responses(path, method, operation)}
            for method, operation in operations.items()
        }
        for path, operations in document["paths"].items()
    }
    for path in _LINKED:
        paths[path]["post"]["responses"]["200"] |= {"links": _links(paths, path)}
    return document | {"paths": paths}


def _links(paths: dict[str, Any], path: str) -> dict[str, Any]:
    links = {}
    for target in _LINKED[path]:
        (name,) = (part[1:-1] for part in target.split("/") if part.startswith("{"))
        for operation in paths[target].values():
            identity = operation["operationId"]
            links[identity] = {
                "operationId": identity,
                "parameters": {name: "$response.body#/id"},
            }
    return links


def _responses(path: str, method: str, operation: dict[str, Any]) -> dict[str, Any]:
    told = {status: {**one} for status, one in operation["responses"].items() if status < "300"}
    if path in _PUBLIC:  # not failures: the same body says why
        return told | {"503": told["200"] | {"description": "Not now"}}
    statuses = {401, 403, 429, 500, 503}
    if method == "post" and not path.startswith("/admin"):
        statuses |= {400, 404, 413}
    if "parameters" in operation:
        statuses |= {400, 404}
    if path.startswith("/admin"):
        statuses |= {400, 409}
    if path in _TIMED:
        statuses.add(504)
    schema = _ANTHROPIC if path.startswith("/v1/messages") else _OPENAI
    content = {"application/json": {"schema": schema}}
    return told | {
        str(status): {"description": _WORDS[status], "content": content}
        for status in sorted(statuses)
    }


class JsonDocument(JsonRenderPlugin):
    """The document as JSON."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return super().render(request, with_failures(openapi_schema))


class YamlDocument(YamlRenderPlugin):
    """The document as YAML."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return super().render(request, with_failures(openapi_schema))
