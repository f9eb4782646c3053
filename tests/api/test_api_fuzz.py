"""Nonsense of every shape, on every endpoint: refused or answered, never a 5xx, and the server lives."""

from __future__ import annotations

import random
from typing import Any

import pytest
from served import Served

from halyard.api.schemas.batches import BatchRequest
from halyard.api.schemas.chat import ChatCompletionRequest
from halyard.api.schemas.completions import CompletionRequest
from halyard.api.schemas.messages import CountTokensRequest, MessageRequest
from halyard.api.schemas.responses import ResponseRequest
from halyard.api.schemas.tokens import DetokenizeRequest, TokenizeRequest

HI = [{"role": "user", "content": "hi"}]
ENDPOINTS: dict[str, tuple[type, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": HI}),
    "/v1/completions": (CompletionRequest, {"prompt": "hi"}),
    "/v1/responses": (ResponseRequest, {"input": "hi"}),
    "/v1/messages": (MessageRequest, {"messages": HI, "max_tokens": 4}),
    "/v1/messages/count_tokens": (CountTokensRequest, {"messages": HI}),
    "/v1/batches": (BatchRequest, {"input_file_id": "file-0", "endpoint": "/v1/completions"}),
    "/tokenize": (TokenizeRequest, {"prompt": "hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [65]}),
}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 10**30, 0.5, -1e300, "", "x", "none", "auto", "\x00", "\ud7ff",
    [], [1], [""], ["x"], [None], [[]], [{}], {}, {"type": "x"}, {"type": "function"}, {"x": 1},
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}],
    [{"role": "user"}], [{"role": "tool", "content": []}], [{"role": "user", "content": [{}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
    [{"type": "function_call"}], [{"type": "function_call_output"}], {"format": {"type": "json_schema"}},
    {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}, {"0": 1.0}, {"-1": 5},
    {"json": "{"}, {"choice": [1]}, {"include_usage": True}, {"effort": 5},
]  # fmt: skip


@pytest.mark.parametrize("path", ENDPOINTS)
def test_nonsense_is_never_a_5xx(served: Served, path: str) -> None:
    kind, base = ENDPOINTS[path]
    rng = random.Random(path)
    names = [name for name in kind.__struct_fields__ if name not in ("background",)]
    for _ in range(250):
        body = dict(base)
        for name in rng.sample(names, min(rng.randint(1, 3), len(names))):
            body[name] = rng.choice(VALUES)
        answer = served.post(path, **body)
        assert answer.status_code < 500, (body, answer.text)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]
    assert served.http.get("/ready").status_code == 200
