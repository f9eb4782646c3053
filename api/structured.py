"""Wire fields that hold an answer to a form become one Constraint, or none."""

from collections.abc import Callable
from typing import Any

from halyard.api.schemas.common import SamplingFields
from halyard.hal.errors import RequestError
from halyard.runtime.request import Constraint

__all__ = ["constraint_of"]

_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_FORMATS = "text, json_object or json_schema"
# vLLM's switches of `structured_outputs` that say how, not what.
_SETTINGS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern",
             "disable_fallback", "_backend", "_backend_was_auto", "backend")  # fmt: skip


def constraint_of(request: SamplingFields) -> Constraint | None:
    """What the answer must look like.

    Raises:
        RequestError: malformed, or several fields ask for a form.
    """
    found = [
        *_from_format(request.response_format),
        *_from_structured(request.structured_outputs),
        *(
            _make(name.removeprefix("guided_"), value, name)
            for name in _GUIDED
            if (value := getattr(request, name)) is not None
        ),
    ]
    if len(found) > 1:
        names = " and ".join(constraint.param for constraint in found)
        raise RequestError(f"{names} exclude each other: give one", found[-1].param)
    return found[0] if found else None


def _from_format(given: dict[str, Any] | None) -> list[Constraint]:
    if given is None:
        return []
    kind = given.get("type")
    match kind:
        case "text":
            return []
        case "json_object":
            return [Constraint.json_object("response_format")]
        case "json_schema":
            inner = given.get("json_schema")
            if not isinstance(inner, dict) or inner.get("schema") is None:
                raise RequestError(
                    "response_format of type json_schema needs json_schema.schema",
                    "response_format",
                )
            return [Constraint.json_schema(inner["schema"], "response_format")]
    raise RequestError(f"response_format must be {_FORMATS}, got {kind!r}", "response_format")


def _from_structured(given: Any) -> list[Constraint]:
    if given is None:
        return []
    name = "structured_outputs"
    if not isinstance(given, dict):
        raise RequestError(f"{name} must be an object", name)
    found = []
    for key, value in given.items():
        if value in (None, False) or key in _SETTINGS:
            continue
        found.append(_make(key, value, f"{name}.{key}"))
    return found


def _make(kind: str, value: Any, param: str) -> Constraint:
    def text(make: Callable[[str, str], Constraint]) -> Constraint:
        if not isinstance(value, str):
            raise RequestError(f"{param} must be a string", param)
        return make(value, param)

    match kind:
        case "json":
            return Constraint.json_schema(value, param)
        case "json_object":
            return Constraint.json_object(param)
        case "regex":
            return text(Constraint.regex)
        case "grammar":
            return text(Constraint.grammar)
        case "choice":
            if not isinstance(value, list):
                raise RequestError(f"{param} must be a list of texts", param)
            return Constraint.choice(value, param)
    raise RequestError(f"{param} is not supported: leave it out", param)
