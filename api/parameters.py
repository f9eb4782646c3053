"""What becomes of request parameters: honoured unless listed here. docs/api.md is made from this."""

from typing import Any

from halyard.hal.errors import RequestError

__all__ = ["IGNORED", "REFUSED", "refuse", "refused_names"]

IGNORED = {
    "user": "names the caller; nothing here depends on it",
    "metadata": "for the caller's own records",
    "store": "nothing is stored, the answer is the same",
    "service_tier": "there is one",
    "safety_identifier": "names the caller",
    "prompt_cache_key": "prefixes are shared anyway",
    "prompt_cache_retention": "prefixes are kept as long as memory allows",
    "prediction": "a hint for speed; the answer is the same without it",
    "request_id": "send X-Request-Id instead; it names the request, not the answer",
    "include": "nothing of what can be included exists here",
    "max_tool_calls": "no tool runs here",
    "spaces_between_special_tokens": "no effect with the tokenizers that are read",
}
"""Parameters that change no answer, and why."""

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": ((), "models here write on from a prompt, not between two"),
    "use_beam_search": ((), "answers are sampled"),
    "length_penalty": ((1.0,), "it belongs to beam search"),
    "bad_words": ((), "use logit_bias"),
    "allowed_token_ids": ((), "use guided_choice or guided_regex"),
    "logits_processors": ((), "no code of callers runs here"),
    "prompt_embeds": ((), "prompts are text or token ids"),
    "audio": ((), "models here write text"),
    "web_search_options": ((), "no web search here"),
    "documents": ((), "put them into the messages"),
    "chat_template": ((), "templates of callers are code"),
    "functions": ((), "give them as tools"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "conversation": ((), "use previous_response_id"),
    "prompt": ((), "stored prompts live on OpenAI's servers"),
    "top_logprobs": ((), "use /v1/chat/completions"),
    "add_special_tokens": ((), "the chat template writes them"),
    "verbosity": (("medium",), "say it in the messages"),
}
"""Parameters that would change the answer: values that are fine anyway, and what to do instead.

False, null, 0 and what is empty are fine for all of them.
"""


_ELSEWHERE = {
    "prompt": ("CompletionRequest", "TokenizeRequest"),
    "add_special_tokens": ("CompletionRequest", "EmbeddingRequest", "TokenizeRequest"),
    "top_logprobs": ("ChatCompletionRequest",),
}
"""Requests that honour a name which the others refuse."""


def refused_names(kind: type) -> list[str]:
    """Parameters of a request type that are refused."""
    fields = getattr(kind, "__struct_fields__", ())
    return [
        name for name in REFUSED if name in fields and kind.__name__ not in _ELSEWHERE.get(name, ())
    ]


_refused_names: dict[type, list[str]] = {}  # by kind of request


def refuse(request: Any) -> None:
    """Refuse what would change the answer but isn't served.

    Raises:
        RequestError: one of them is set; it is named.
    """
    kind = type(request)
    if (names := _refused_names.get(kind)) is None:
        names = _refused_names[kind] = refused_names(kind)
    for name in names:
        value = getattr(request, name)
        fine, instead = REFUSED[name]
        if value and value not in fine:
            raise RequestError(f"{name} is not supported: {instead}", name)
