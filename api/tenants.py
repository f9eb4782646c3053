"""Who calls: tenants, what they may do, and the caller of the request at hand."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, replace

import msgspec

from halyard.api.errors import ForbiddenError
from halyard.api.limits import Admission, Meter, check_seconds
from halyard.api.prompt_log import PromptLog
from halyard.hal.errors import ConfigError, ContextLengthError
from halyard.runtime.request import RequestOptions, SamplingParams

__all__ = ["ANYBODY", "STRANGER", "Caller", "Tenant", "act_as", "caller"]


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Somebody who holds keys. null: no limit.

    Raises:
        ConfigError: a value is out of range.
    """

    name: str = "default"
    requests_per_minute: int | None = None  # POSTs over HTTP; lines of batches don't count
    tokens_per_minute: int | None = None  # of prompts and answers, batches included
    concurrent_requests: int | None = None  # running or waiting, batches included
    max_context: int | None = None  # tokens of a prompt and its answer together
    models: tuple[str, ...] | None = None  # names as served; null: all
    priority: int = 0  # of its requests; they may ask for a higher number (later), not a lower one
    share: float = 1.0  # of the engine when tenants compete, against the others' shares
    admin: bool = False  # may read /metrics and everybody's usage, and use /admin
    log_prompts: bool = True  # where the server logs prompts

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests",
                     "max_context"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} of tenant {self.name} must be at least 1, got {value}")
        if not 0.001 <= self.share <= 1000:
            raise ConfigError(f"share of tenant {self.name} must be between 0.001 and 1000")


@dataclass(frozen=True, slots=True)
class Caller:
    """One request's tenant and what comes with it."""

    tenant: Tenant
    meter: Meter
    known: bool = True  # False: there are no keys, everybody is the same tenant
    deadline: float | None = None  # time.monotonic() when the answer must be there
    prompt_log: PromptLog | None = None  # None: prompts are not logged

    @property
    def stranger(self) -> bool:
        """Whether there are keys, and none was brought: at the few doors that are open."""
        return self.known and not self.tenant.name

    def salt(self, own: str | None) -> str:
        """What keeps prefix blocks apart: the tenant, then what its client chose."""
        return f"{self.tenant.name}\0{own or ''}" if self.known else own or ""

    def priority(self, asked: int | None) -> int:
        if not self.known:
            return asked or 0
        return self.tenant.priority if asked is None else max(asked, self.tenant.priority)

    def until(self, timeout: float | None) -> float | None:
        """The deadline, an own `timeout` in seconds considered.

        Raises:
            RequestError: that is out of range.
        """
        if timeout is None:
            return self.deadline
        own = time.monotonic() + check_seconds(timeout, "timeout")
        return own if self.deadline is None else min(own, self.deadline)

    def check_model(self, model: str) -> None:
        """
        Raises:
            ForbiddenError: it is not for this tenant.
        """
        if self.tenant.models is not None and model not in self.tenant.models:
            raise ForbiddenError(f"this key is not for model {model!r}", "model")

    def fit(self, params: SamplingParams, longest_prompt: int) -> SamplingParams:
        """Keep an answer within the tenant's context.

        Raises:
            ContextLengthError: the prompt alone fills it.
        """
        most = self.tenant.max_context
        if most is None:
            return params
        room = most - longest_prompt
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {longest_prompt} tokens, but this key's context holds {most} for "
                "prompt and answer together: shorten the prompt",
                "prompt",
            )
        if params.max_tokens is not None and params.max_tokens <= room:
            return params
        return replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))

    def admit(self, prompt_tokens: int) -> Admission:
        """Begin to answer.

        Raises:
            RateLimitedError: over one of the tenant's limits.
        """
        tenant = self.tenant
        return self.meter.begin(prompt_tokens, tenant.concurrent_requests, tenant.tokens_per_minute)

    def submit_options(
        self, request_id: str, priority: int | None, cache_salt: str | None
    ) -> RequestOptions:
        """What `Client.submit` is told about the caller."""
        return {
            "request_id": request_id,
            "priority": self.priority(priority),
            "cache_salt": self.salt(cache_salt),
            "tenant": self.tenant.name,
            "share": self.tenant.share,
        }


ANYBODY = Caller(Tenant(admin=True), Meter(), known=False)
"""Whoever calls a server without keys."""

STRANGER = Caller(Tenant("", admin=False), Meter())
"""Whoever brings no key to a server that has some."""

_caller: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


def caller() -> Caller:
    """The caller of the request that this task, or the task that made it, belongs to."""
    return _caller.get()


def act_as(who: Caller) -> None:
    """From now on this task, and those that it makes, work for that caller."""
    _caller.set(who)
