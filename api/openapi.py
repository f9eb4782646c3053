"""Documents bodies that handlers parse themselves."""

from dataclasses import dataclass
from typing import Any

import msgspec
from litestar.openapi.spec import OpenAPIMediaType, Operation, Parameter, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIType

__all__ = ["PlainPath", "body_of"]


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
