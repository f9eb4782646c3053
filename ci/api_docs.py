"""Writes docs/api.md from the request types: what becomes of every parameter.

python ci/api_docs.py          write it
python ci/api_docs.py --check  exit status 1 if it is out of date
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from halyard.api.controllers.batches import BatchController, FileController
from halyard.api.controllers.responses import ResponseController
from halyard.api.parameters import IGNORED, REFUSED, refused_names
from halyard.api.schemas.batches import BatchRequest
from halyard.api.schemas.chat import ChatCompletionRequest
from halyard.api.schemas.completions import CompletionRequest
from halyard.api.schemas.embeddings import EmbeddingRequest
from halyard.api.schemas.messages import CountTokensRequest, MessageRequest
from halyard.api.schemas.responses import ResponseRequest
from halyard.api.schemas.tokens import DetokenizeRequest, TokenizeRequest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
ENDPOINTS = {
    "POST /v1/chat/completions": ChatCompletionRequest,
    "POST /v1/completions": CompletionRequest,
    "POST /v1/embeddings": EmbeddingRequest,
    "POST /v1/responses": ResponseRequest,
    "POST /v1/messages": MessageRequest,
    "POST /v1/messages/count_tokens": CountTokensRequest,
    "POST /v1/batches": BatchRequest,
    "POST /tokenize": TokenizeRequest,
    "POST /detokenize": DetokenizeRequest,
}
LISTS: dict[str, Any] = {
    "GET /v1/files": FileController.list_files,
    "GET /v1/batches": BatchController.list_batches,
    "GET /v1/responses/{id}/input_items": ResponseController.items,
}
# Endpoint-specific: what a shared name means there.
HONOURED_THERE = {("POST /v1/responses", "store")}
IGNORED_THERE = {
    ("POST /v1/responses", "stream_options"): "streams hold no padding to switch off",
}
REFUSED_THERE = {
    ("POST /v1/messages", "container"): "nothing runs code here",
    ("POST /v1/messages", "mcp_servers"): "no tool runs here",
    ("POST /v1/messages", "context_management"): "shorten the messages",
}
INTRO = """\
# The HTTP API

Made by `PYTHONPATH=pkg python ci/api_docs.py` from the request types; a test checks that it is up to date.

Change the base URL of a program written for OpenAI, vLLM or Anthropic, nothing else. Every parameter
is honoured, ignored because it changes no answer, or refused with a 400 that names it. Names that
are not listed are ignored. `null` is the default everywhere.

| endpoint | what |
|---|---|
| `POST /v1/chat/completions` | conversations, with tools, thoughts and structured output |
| `POST /v1/completions` | text goes on; `echo`, `logprobs`, `prompt_logprobs` |
| `POST /v1/embeddings` | the final hidden states as vectors of length one; up to 2048 inputs |
| `POST /v1/responses` | conversations that the server remembers (the last 1000, in memory) |
| `GET /v1/responses/{id}` | a stored response; also `DELETE`, `POST .../cancel`, `GET .../input_items` |
| `POST /v1/messages` | Anthropic's conversations |
| `POST /v1/messages/count_tokens` | how long one is |
| `POST /v1/files`, `GET /v1/files[/{id}[/content]]`, `DELETE` | files of batches, in `--data-dir` |
| `POST /v1/batches`, `GET /v1/batches[/{id}]`, `POST .../cancel` | many requests in a file; `halyard batch` is the same without a server |
| `GET /v1/models`, `GET /v1/models/{id}` | what is served |
| `POST /tokenize`, `POST /detokenize` | text to ids and back |
| `GET /v1/usage` | what the caller's tenant has used, and what that costs |
| `GET /v1/provenance/{fingerprint}` | what made the answers with that `system_fingerprint` |
| `GET /health`, `/ready`, `/version`, `/metrics`, `/schema` | for operators: [observability.md](observability.md) |
| `GET /status`, `/status/live`, `/history`, `/plan`, `/conformance` | what the page draws: requests, KV blocks, curves, the plan, reports |

**How long an answer may get.** `max_tokens` (`max_completion_tokens`, `max_output_tokens`) is an upper
bound: one that reaches beyond the context is taken as what the context leaves after the prompt, and the
answer ends there with "length", for chats and completions alike. vLLM 0.32 does the same; OpenAI
refuses numbers above a model's own limit. Left out, chats may go on to the context's end and
completions have 16. A prompt that leaves no room for a token is refused with `context_length_exceeded`.

**Structured output.** `response_format`, `structured_outputs` or one of the `guided_*` fields, at most
one. Needs `llguidance`. Schemas are always held to (`strict` changes nothing); what can't be held to,
can't be satisfied or is too complex is refused before anything runs. Models that think do so first:
the form holds for what follows the thought. An answer that `max_tokens` cuts off ends with
`finish_reason` "length" and is no whole form, as elsewhere; with `guided_finish` it is led to the end of
its form instead once few tokens are left (looked for within the last 512), and ends with "stop".

**Tools.** The chat template decides how calls are written (Hermes and Qwen, Mistral, Llama 3); a model
whose template knows none refuses `tools`. `tool_choice` required or by name is enforced by a
grammar; auto is read off the answer. Thoughts (`<think>`) come back as `reasoning_content`.

**Errors** are `{"error": {"message", "type", "param", "code"}}`, for `/v1/messages` Anthropic's
envelope. 400 names the field, 401 asks for an API key, 403 is not for this key, 404 an unknown model,
429 a limit or a full queue (with Retry-After), 503 a server that loads, stops or has failed, 504 a
deadline. [production.md](production.md) is about keys and limits.
"""


def comments(kind: type) -> dict[str, str]:
    """Field name -> the comment beside it, read off the sources of a type and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith("halyard."):
            continue
        text = (
            ROOT / (base.__module__.removeprefix("halyard.").replace(".", "/") + ".py")
        ).read_text()
        body = text.partition(f"class {base.__name__}(")[2].partition("\nclass ")[0]
        for name, comment in re.findall(r"^    (\w+): [^\n#]*(?:# ([^\n]*))?$", body, re.MULTILINE):
            found[name] = comment or found.get(name, "")
    return found


def row(endpoint: str, kind: type, name: str, comment: str) -> str:
    if reason := IGNORED_THERE.get((endpoint, name)):
        return f"| `{name}` | ignored | {reason} |"
    if reason := REFUSED_THERE.get((endpoint, name)):
        return f"| `{name}` | refused | {reason} |"
    if (endpoint, name) in HONOURED_THERE:
        return f"| `{name}` | honoured | {comment} |"
    if name in refused_names(kind):
        fine, instead = REFUSED[name]
        allowed = f"; fine: {', '.join(map(repr, fine))}" if fine else ""
        return f"| `{name}` | refused | {instead}{allowed} |"
    if name in IGNORED:
        return f"| `{name}` | ignored | {IGNORED[name]} |"
    return f"| `{name}` | honoured | {comment} |"


def query_row(name: str, parameter: inspect.Parameter) -> str:
    """A parameter of a list's address."""
    annotation, said = get_args(parameter.annotation)
    values = [one for one in get_args(annotation) or [annotation] if one is not type(None)]
    if get_origin(values[0]) is Literal:
        values = list(get_args(values[0]))
    if annotation is int:
        kind = f"{said.ge} to {said.le}"
    else:
        kind = ", ".join("a text" if one is str else str(one) for one in values)
    usual = "" if parameter.default is None else f"; {parameter.default} by default"
    return f"| `{name}` | {kind}{usual} | {said.description} |"


def lists() -> str:
    parts = ["## Lists\n\nIn pages: `has_more` says whether another follows `last_id`. A value that is out of range is "
             "refused.\n"]  # fmt: skip
    for endpoint, handler in LISTS.items():
        asked = inspect.signature(handler.fn, eval_str=True).parameters
        rows = [query_row(*one) for one in asked.items()
                if one[0] not in ("self", "request", "response_id")]  # fmt: skip
        parts.append(
            f"**{endpoint}**\n\n| parameter | | |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts)


def page() -> str:
    parts = [INTRO]
    for endpoint, kind in ENDPOINTS.items():
        told = comments(kind)
        rows = [row(endpoint, kind, name, told.get(name, "")) for name in kind.__struct_fields__]
        order = {"honoured": 0, "ignored": 1, "refused": 2}
        rows.sort(key=lambda line: order[line.split(" | ")[1]])
        parts.append(
            f"## {endpoint}\n\n| parameter | | |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join([*parts, lists()])


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.is_file() and PAGE.read_text() == text:
            return 0
        print("docs/api.md is out of date: run PYTHONPATH=pkg python ci/api_docs.py")
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
