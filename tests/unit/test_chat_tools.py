"""Functions whose arguments no call can hold: a call's arguments are a JSON object."""

from __future__ import annotations

from typing import Any

import pytest

from halyard.api.chat_tools import _function
from halyard.hal.errors import RequestError


@pytest.mark.parametrize("kind", ["integer", "array", "foo", None, 5])
def test_parameters_of_another_type_than_object_are_refused(kind: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": kind}}}
    with pytest.raises(RequestError, match='type "object"') as error:
        _function(tool, "tools[0]")
    assert error.value.param == "tools[0].function.parameters"


@pytest.mark.parametrize(
    "parameters",
    [{}, None, {"type": "object"}, {"type": ["object", "null"]}, {"$ref": "#/$defs/a"}],
)
def test_parameters_that_may_be_an_object_are_taken(parameters: Any) -> None:
    _function({"type": "function", "function": {"name": "f", "parameters": parameters}}, "tools[0]")
